"""A conversation to prompt text, by the model's own Jinja template, in a sandbox.

Renders what transformers' apply_chat_template renders. The template is a stranger's program: it
gets plain data only, no loader and no file, and its answer has a length limit. Does not tokenize.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from elute.errors import EluteError, FormatError, ShapeError, UnsupportedError
from elute.formats.tokenizer import named_special_tokens
from elute.types import TokenizerFiles

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE_CHARS = 1 << 20  # the longest published templates are near 20,000
MAX_RENDERED_CHARS = 1 << 26  # 64 Mi characters is beyond any context; stops a template that grows
MAX_POWER_BITS = 4096  # 9**(9**9) takes hours, and no signal interrupts it
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A chat template, compiled when it is first rendered: text needs none, whatever its state.

    Bounds on a hostile template: no attribute beginning with an underscore, no mutation of what it
    is given, range() up to 100,000 (jinja2's sandbox), MAX_TEMPLATE_CHARS of source,
    MAX_RENDERED_CHARS of answer, checked as it grows, and of a repeated text, and
    MAX_POWER_BITS of a power.
    Not bounded: the time of nested loops, and the memory of formatting ('%999999999d' % 1); who
    renders templates of strangers for others needs a process with limits.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """special_tokens: variables that the template may use, {"bos_token": "<s>", ...}.

        Raises FormatError for a template that is too long.
        """
        if len(template) > MAX_TEMPLATE_CHARS:
            raise FormatError(
                f"chat template: {len(template)} characters, wanted at most {MAX_TEMPLATE_CHARS}; "
                "is it the right file?"
            )
        self.source = template
        self._special_tokens = dict(special_tokens or {})

    @cached_property
    def _template(self) -> Template:
        from jinja2.exceptions import TemplateError

        try:
            return _environment().from_string(self.source)
        except (TemplateError, RecursionError, MemoryError, SyntaxError, OverflowError) as error:
            line = getattr(error, "lineno", None)
            where = f"chat template, line {line}" if line else "chat template"
            raise FormatError(
                f"{where}: {_sentence(error)}; fetch the model again or use --raw"
            ) from error

    @classmethod
    def from_files(cls, files: TokenizerFiles) -> ChatTemplate:
        """The template of a model, with the special tokens that tokenizer_config.json names.

        Raises UnsupportedError for a model without one: no format can be guessed for it.
        """
        template = files.chat_template
        if template is None:
            template = _configured(files.tokenizer_config.get("chat_template"))
        if template is None:
            raise UnsupportedError(
                "chat template: this model has none, so it cannot chat; "
                "use `elute run --raw` or Model.generate, which take text as it is"
            )
        return cls(template, named_special_tokens(files.tokenizer_config))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation: encode it with parse_special=True and add_special=False.

        messages    [{"role": "user", "content": "..."}, ...]; text, numbers, lists and maps only
        tools       JSON schemas of functions
        documents   [{"title": ..., "text": ...}, ...]
        variables   further names for the template (enable_thinking=False, ...); they win over the
                    special tokens

        Raises FormatError for a template that does not compile, ShapeError for messages that are
        not a list of maps; EluteError with the template's
        own words when it refuses the conversation, and for anything else that goes wrong in it.
        """
        from jinja2.exceptions import TemplateError

        for name, items in (("messages", messages), ("tools", tools), ("documents", documents)):
            _check_maps(name, items)
        names = {
            **self._special_tokens,
            **_plain(variables, "variables"),
            "messages": [_with_reasoning_names(_plain(m, "messages")) for m in messages],
            "tools": _plain(tools, "tools"),
            "documents": _plain(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        n_chars = 0
        try:
            for piece in self._template.generate(names):
                pieces.append(piece)
                n_chars += len(piece)
                if n_chars > MAX_RENDERED_CHARS:
                    raise FormatError(
                        f"chat template: the prompt passed {MAX_RENDERED_CHARS} characters; "
                        "is the template made to grow?"
                    )
        except EluteError:
            raise
        except TemplateError as error:
            raise EluteError(f"chat template: {_sentence(error)}") from error
        except Exception as error:  # a template is a program and may raise anything
            raise EluteError(
                f"chat template: {type(error).__name__}: {_sentence(error)}; "
                "does the conversation have the roles and fields that this model knows?"
            ) from error
        return "".join(pieces)


def _configured(value: object) -> str | None:
    """chat_template of tokenizer_config.json: a string, or a list of named ones."""
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, Mapping)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise FormatError(
            f"tokenizer_config.json: chat_template is a {type(value).__name__}, wanted a string or "
            "a list of named templates"
        )
    return value


def _sentence(error: BaseException) -> str:
    """One line, because an error is one sentence and a template may raise pages."""
    return " ".join(str(error).split())[:500].rstrip(".")


def _check_maps(name: str, items: object) -> None:
    if items is None and name != "messages":
        return
    if not isinstance(items, Sequence) or isinstance(items, str | bytes):
        raise ShapeError(f"chat {name}: found a {type(items).__name__}, wanted a list of maps")
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise ShapeError(f"chat {name}: entry {i} is a {type(item).__name__}, wanted a map")


def _plain(value: Any, where: str) -> Any:
    """A copy of plain types only: the sandbox cannot tell safe methods of other objects.

    Differs from transformers: an object of another type is an error, not its type's name as text.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # of an enum the text, which str() would hide
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, where) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item, where) for item in value)
    raise ShapeError(
        f"chat {where}: found a {type(value).__name__}, wanted text, numbers, lists and maps"
    )


def _with_reasoning_names(message: dict[str, Any]) -> dict[str, Any]:
    """Templates read reasoning under one of three names; as transformers, give the first to all."""
    for name in _REASONING_NAMES:
        if (reasoning := message.get(name)) is not None:
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _are_ints(left: object, right: object) -> bool:
    return isinstance(left, int) and isinstance(right, int)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks the assistant's words for training; here it is only a scope."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 reads a plain class attribute)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class GuardedNamespace(Namespace):
        """namespace() without underscored names, through which Python's internals are reached."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args  # so that namespace(self=...) works, as in jinja2
            attributes = dict(*rest, **kwargs)
            for name in attributes:
                _refuse_underscore(name)
            Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_underscore(name)
            Namespace.__setitem__(self, name, value)

    def _refuse_underscore(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    class BoundedEnvironment(ImmutableSandboxedEnvironment):
        """Refuses what makes a giant of two small operands: 'a' * 10**9, 9**(9**9)."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            if operator == "**":
                large = _are_ints(left, right) and right * left.bit_length() > MAX_POWER_BITS
            else:
                lengths = [len(x) if isinstance(x, Sequence) else x for x in (left, right)]
                large = lengths != [left, right] and lengths[0] * lengths[1] > MAX_RENDERED_CHARS
            if large:
                raise SecurityError(f"the result of {operator} would be too large")
            return super().call_binop(context, operator, left, right)

    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.globals["namespace"] = GuardedNamespace
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own escapes <, > and &, which a prompt must not have."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
