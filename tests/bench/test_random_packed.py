import numpy as np
import pytest

import elute
from elute.bench.random_packed import SPECIAL, random_packed, tokenizer_files
from elute.bench.random_weights import RandomWeights, random_recipe
from elute.bench.shapes import CONFIGS
from elute.errors import ShapeError
from elute.formats.tokenizer import Tokenizer
from elute.model.families import op_list

CONFIG = {
    **CONFIGS["qwen2.5-0.5b"],
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
}
RECIPE = random_recipe(bits=3, outer_bits=8)


@pytest.mark.parametrize("vocabulary", [258, 259, 400, 5000])
def test_a_tokenizer_has_the_vocabulary_and_reads_any_text(vocabulary):
    made = Tokenizer.from_files(tokenizer_files(vocabulary))
    assert made.vocabulary_size == vocabulary
    assert made.eos_ids == (vocabulary - 1,)
    for text in ("the sea is as high as the sun", "Grüße 🙂\n", "".join(SPECIAL)):
        for special in (True, False):
            ids = made.encode(text, parse_special=special)
            assert made.decode(ids, skip_special=False) == text


def test_every_word_is_reached_by_its_merges():
    made = Tokenizer.from_files(tokenizer_files(1000))
    words = [made.token_text(token) for token in range(256, 998)]
    assert [made.encode(word) for word in words] == [[token] for token in range(256, 998)]


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ShapeError, match="vocab_size: found 257, wanted at least 258"):
        tokenizer_files(257)


def test_what_is_packed_are_the_weights_in_memory(tmp_path):
    packed = random_packed(CONFIG, RECIPE, tmp_path / "model")
    packed.verify()
    ops = op_list(CONFIG)
    weights = RandomWeights(ops, RECIPE)
    for name in ops.matrices():
        found, want = packed.matrix(name), weights.matrix(name)
        assert np.array_equal(found.planes, want.planes)
        assert np.array_equal(found.scales, want.scales)
    for name in ops.vectors():
        assert np.array_equal(packed.vector(name), weights.vector(name))


def test_it_loads_and_answers(tmp_path):
    path = random_packed(CONFIG, RECIPE, tmp_path / "model").path
    with elute.load(path, cache_dir=tmp_path) as model:
        assert len(model.generate("on", max_tokens=3, ignore_end=True).tokens) == 3
