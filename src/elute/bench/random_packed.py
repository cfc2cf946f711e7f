"""Packed folders of random weights, for what a model in memory cannot show: opening, mapped pages.

The weights are those of random_weights, and go to the disk once. The tokenizer is as large as a
real one of that vocabulary and reads any text; its words mean nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elute.bench.random_weights import RandomWeights
from elute.errors import ShapeError
from elute.formats.packed import PackedModel, PackedWriter
from elute.formats.text_stream import byte_alphabet
from elute.model.families import op_list
from elute.model.weights import weight_shapes
from elute.quantize.recipe import Recipe
from elute.types import TokenizerFiles

SPECIAL = ("<|begin|>", "<|end|>")
LETTERS = "etaoinsh"  # 8: words of 6 letters fill a vocabulary of 256k, as long as real tokens are
MERGES_A_TOKEN = 2  # Llama 3 and Gemma 3 have 2.0 to 2.2, Qwen 1.0


def random_packed(config: Mapping[str, Any], recipe: Recipe, out: Path) -> PackedModel:
    """Writes a model of this config.json to `out`, which must not exist.

    Raises BudgetError when memory or disk do not hold the weights, ShapeError for a vocabulary too
    small for all bytes.
    """
    ops = op_list(config)
    tokenizer = tokenizer_files(ops.vocabulary)
    weights = RandomWeights(ops, recipe)
    shapes = weight_shapes(ops)
    with PackedWriter(
        out,
        names=(*ops.matrices(), *ops.vectors()),
        config=config,
        tokenizer=tokenizer,
        source="random weights",
        recipe=recipe.to_json(),
        runs=ops.runs(),
    ) as writer:
        for name in ops.matrices():
            n, k = shapes[name]
            writer.add_matrix(name, (n, k), [weights.matrix(name)])
        for name in ops.vectors():
            writer.add_vector(name, weights.vector(name))
    return PackedModel.open(out)


def tokenizer_files(vocabulary: int) -> TokenizerFiles:
    """A byte-level BPE of `vocabulary` tokens: all bytes, then all words of LETTERS by length.

    Raises ShapeError for a vocabulary too small for all bytes.
    """
    tokens = {char: i for i, char in enumerate(byte_alphabet())}
    n_words = vocabulary - len(tokens) - len(SPECIAL)
    if n_words < 0:
        raise ShapeError(
            f"vocab_size: found {vocabulary}, wanted at least {len(tokens) + len(SPECIAL)} for all "
            "bytes; use a larger one"
        )
    merges: list[tuple[str, str]] = []
    for word in itertools.islice(_words(), n_words):
        tokens[word] = len(tokens)
        merges += [(word[:i], word[i:]) for i in range(1, min(len(word), MERGES_A_TOKEN + 1))]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    spec = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": len(tokens) + i,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, content in enumerate(SPECIAL)
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": tokens, "merges": merges},
    }
    return TokenizerFiles(
        tokenizer_json=json.dumps(spec, ensure_ascii=False),
        tokenizer_config={"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]},
        generation_config={"eos_token_id": vocabulary - 1},
    )


def _words() -> itertools.chain[str]:
    lengths = itertools.count(2)
    return itertools.chain.from_iterable(
        map("".join, itertools.product(LETTERS, repeat=length)) for length in lengths
    )
