"""Chat templates: rendered as transformers renders them, and harmless when hostile."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import pytest

from elute.errors import EluteError, FormatError, ShapeError, UnsupportedError
from elute.formats import chat_template
from elute.formats.chat_template import ChatTemplate
from elute.types import TokenizerFiles

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

USER = {"role": "user", "content": "Héllo <b>&\n'quotes' \"double\" {{ x }} 你好"}
ANSWER = {"role": "assistant", "content": "  Hi there! \n"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": None,
    "reasoning": "2 + 2",
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": [2, "é"]}}}],
}
RESULT = {"role": "tool", "name": "add", "content": '{"sum": 4}'}
PARTS = {"role": "user", "content": [{"type": "text", "text": "in"}, {"type": "image"}]}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <numbers> & more",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]
CHATS: dict[str, list[Mapping[str, Any]]] = {
    "one": [USER],
    "turns": [USER, ANSWER, USER],
    "system": [SYSTEM, USER, ANSWER, {"role": "user", "content": " more "}],
    "tools": [SYSTEM, USER, CALL, RESULT, ANSWER, USER],
    "parts": [PARTS, ANSWER, USER],
    "wrong order": [ANSWER, USER, USER],
    "empty": [],
}

TEMPLATES = {
    "chatml": """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '')|string + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""",
    "default system": """{% for m in messages %}{% if loop.first and m['role'] != 'system' %}
{{ '<|im_start|>system\\nYou help.<|im_end|>' }}
{% endif %}
<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}""",
    "llama 3": """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
  + (message['content'] | string | trim) + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt }}""",
    "mistral": """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}
{%- endif %}{% endfor %}""",
    "gemma": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}{%- set prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
    {%- set rest = messages[1:] -%}
{%- else -%}{%- set prefix = "" -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}<start_of_image>
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}""",
    "qwen tools": """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not
        (message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls %}
        {{- '<|im_start|>assistant\\n<think>' + (message.reasoning_content or '') + '</think>' }}
        {%- for call in message.tool_calls %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<tool_call>{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}</tool_call>' }}
        {%- endfor %}
    {%- else %}{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content }}{%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{{- ns.last_query_index }}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}
    {%- endif %}
{%- endif %}""",
    "tojson options": "{{ tools | tojson(indent=4) }}{{ messages | tojson(sort_keys=true) }}"
    "{{ 'é<&>' | tojson }}{{ 'é' | tojson(ensure_ascii=true) }}",
    "loop controls": """{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}
{{ loop.index }}{{ m.role }}{% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}""",
    "generation block": """{% set seen = 'outer' %}{% for m in messages %}
{% if m.role == 'assistant' %}{% generation %}{% set seen = 'inner' %}{{ m.content }}{{ eos_token }}
{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ seen }}
{% endfor %}""",
    "macro": """{% macro line(role, text='-') %}{{ role|upper }}: {{ text }}
{% endmacro %}{% for m in messages %}{{ line(m['role'], m.content) }}{% endfor %}
{{ line('end') }}""",
    "whitespace": "  {% if true %}  \n  x  {% endif %}  \n\n\t{# note #}\n"
    " {%- set a = 1 -%} \n y{{ a }}\n",
    "filters": "{% for m in messages %}{{ m.items() | list | length }}{{ m.get('name', 'no') }}"
    "{{ m | dictsort | first }}{{ (m.content ~ '').split(' ')[-1] | title }}{% endfor %}"
    "{{ dict(a=1) }}{{ messages | map(attribute='role') | join(',') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "undefined": "[{{ nothing }}]{{ pad_token }}{{ unk_token }}"
    "{% if nothing is defined %}x{% endif %}",
    "documents": "{% for d in documents or [] %}{{ d.title }}: {{ d['text'] }}\n{% endfor %}"
    "{{ extra }}",
    "date": "{{ strftime_now('%Y') | length }}{{ date_string | default('today') }}",
    "attribute of undefined": "{{ messages[9].role }}",
    "arithmetic": "{{ 7 // 2 }}{{ 2 ** 10 }}{{ 2 ** -3 }}{{ 1e3 ** 9 }}{{ 'ab' * 3 }}"
    "{{ 3 * [1] }}{{ 1.5 * 2 }}{{ '%s!' % 'a' }}",
}


def _theirs(template: str, chat: list[Mapping[str, Any]], **variables: Any) -> str | None:
    """None where transformers refuses the conversation."""
    rendering = pytest.importorskip("transformers.utils.chat_template_utils")
    from jinja2.exceptions import TemplateError

    try:
        rendered, _ = rendering.render_jinja_template([chat], chat_template=template, **variables)
    except (TemplateError, TypeError):
        return None
    return str(rendered[0])


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_render_equals_transformers(template: str, chat: str) -> None:
    ours = ChatTemplate(TEMPLATES[template], SPECIALS)
    documents = [{"title": "T", "text": "body <b>"}]
    for variables in (
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "tools": TOOLS, "enable_thinking": False},
        {"add_generation_prompt": False, "documents": documents, "extra": (1, 2.5, None)},
    ):
        want = _theirs(TEMPLATES[template], CHATS[chat], **SPECIALS, **variables)
        if want is None:
            with pytest.raises(EluteError, match="chat template: "):
                ours.render(CHATS[chat], **variables)
        else:
            assert ours.render(CHATS[chat], **variables) == want


def test_most_renderings_succeed() -> None:
    """So that the test above compares more than refusals."""
    made = [
        _theirs(t, c, add_generation_prompt=True)
        for t in TEMPLATES.values()
        for c in CHATS.values()
    ]
    assert sum(text is not None for text in made) > 0.7 * len(made)


def test_template_of_a_tokenizer_equals_apply_chat_template() -> None:
    transformers = pytest.importorskip("transformers")
    from awkward_text import files
    from tokenizers import Tokenizer as Backend

    made = files("smollm")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(made.tokenizer_json),
        chat_template=TEMPLATES["mistral"],
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )
    ours = ChatTemplate.from_files(
        TokenizerFiles(made.tokenizer_json, made.tokenizer_config, TEMPLATES["mistral"])
    )
    want = theirs.apply_chat_template(CHATS["turns"], tokenize=False, add_generation_prompt=True)
    assert ours.render(CHATS["turns"]) == want
    assert want.startswith("<|endoftext|>[INST]")


@pytest.mark.parametrize(
    "configured",
    ["named", [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "named"}]],
)
def test_template_of_the_config_is_used(configured: Any) -> None:
    made = TokenizerFiles("{}", {"chat_template": configured})
    assert ChatTemplate.from_files(made).render([USER]) == "named"
    made = TokenizerFiles("{}", {"chat_template": configured}, chat_template="of the file")
    assert ChatTemplate.from_files(made).render([USER]) == "of the file"


def test_variables_win_over_special_tokens() -> None:
    ours = ChatTemplate("{{ bos_token }}{{ eos_token }}", SPECIALS)
    assert ours.render([], bos_token="B") == "B</s>"


@pytest.mark.parametrize("configured", [None, [], [{"name": "rag", "template": "x"}]])
def test_model_without_a_template_is_refused_with_a_way_out(configured: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"this model has none.*elute run --raw"):
        ChatTemplate.from_files(TokenizerFiles("{}", {"chat_template": configured}))


def test_template_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(FormatError, match="chat_template is a int, wanted a string"):
        ChatTemplate.from_files(TokenizerFiles("{}", {"chat_template": 3}))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% if %}", "line 2: Expected an expression"),
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("{{ 'open", "line 1: unexpected char"),
        ("{% include 'x' %}{% nonsense %}", "line 1: Encountered unknown tag 'nonsense'"),
        ("{{ x | nonsense }}", "line 1: No filter named 'nonsense'"),
        ("{{" + "(" * 5000, "chat template"),
        ("x" * (chat_template.MAX_TEMPLATE_CHARS + 1), "1048577 characters, wanted at most"),
    ],
)
def test_template_that_does_not_compile_is_refused(template: str, message: str) -> None:
    with pytest.raises(FormatError, match=message) as error:
        ChatTemplate(template).render([USER])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only\\n  user  roles.') }}", "^chat template: only user roles$"),
        ("{{ raise_exception() }}", "TypeError"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0] + 1 }}", "TypeError"),
        ("{% include 'other' %}", "no loader"),
        ("{{ strftime_now(3) }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_template_that_fails_is_one_sentence(template: str, message: str) -> None:
    with pytest.raises(EluteError, match=message) as error:
        ChatTemplate(template).render([USER])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__()[0].x }}",
        "{{ messages.__class__.__base__ }}{{ messages.__class__.x }}",
        "{{ raise_exception.__globals__['x'] }}",
        "{{ strftime_now.__func__.x }}",
        "{{ cycler.__init__.__globals__.os.popen('true') }}",
        "{{ ('%s'|attr('__class__')).x }}",
        "{{ '{0.__class__.x}'.format('') }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update({}) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% for i in range(10**6) %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * [0] }}",
        "{{ 9**(9**9) }}",
        "{{ (0 - 9)**999999999 }}",
        "{{ 2**4096 }}",
    ],
)
def test_hostile_template_is_refused(template: str) -> None:
    messages = [dict(USER)]
    with pytest.raises(EluteError, match="chat template: "):
        ChatTemplate(template).render(messages)
    assert messages == [USER]


def test_prompt_that_grows_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    grows = ChatTemplate(
        "{% for i in range(99999) %}{% for j in range(99999) %}xx{% endfor %}{% endfor %}"
    )
    with pytest.raises(FormatError, match="passed 1000 characters"):
        grows.render([USER])


def test_messages_are_copied_and_enums_are_text() -> None:
    class Role(str, enum.Enum):  # noqa: UP042 (str() of it is not its text, unlike StrEnum's)
        USER = "user"

    assert ChatTemplate("{{ messages[0].role }}").render([{"role": Role.USER}]) == "user"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "chat messages: found a str, wanted a list of maps"),
        (None, "chat messages: found a NoneType, wanted a list of maps"),
        ([USER, "hi"], "chat messages: entry 1 is a str, wanted a map"),
        ([{"role": "user", "content": object()}], "chat messages: found a object, wanted text"),
        ([{"role": "user", "content": b"x"}], "chat messages: found a bytes, wanted text"),
    ],
)
def test_messages_that_are_not_plain_data_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        ChatTemplate("x").render(messages)


def test_tools_and_variables_that_are_not_plain_data_are_refused() -> None:
    with pytest.raises(ShapeError, match="chat tools: entry 0 is a function, wanted a map"):
        ChatTemplate("x").render([USER], tools=[lambda: 0])  # type: ignore[list-item]
    with pytest.raises(ShapeError, match="chat variables: found a object, wanted text"):
        ChatTemplate("x").render([USER], thing=object())


def test_default_model_chats(default_gguf: Any) -> None:
    from elute.formats import open_checkpoint
    from elute.formats.tokenizer import Tokenizer

    files = open_checkpoint(default_gguf).tokenizer_files()
    prompt = ChatTemplate.from_files(files).render([{"role": "user", "content": "Hi"}])
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ours = Tokenizer.from_files(files)
    ids = ours.encode(prompt, add_special=False, parse_special=True)
    assert ids.count(1) == 3  # <|im_start|>
    assert ours.decode(ids, skip_special=False) == prompt
