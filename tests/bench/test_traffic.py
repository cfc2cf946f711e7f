import dataclasses

import pytest
from test_random_weights import TINY

from elute.bench.random_weights import RandomWeights, random_recipe
from elute.bench.subject import stored_as
from elute.bench.traffic import CachedLayer, traffic
from elute.kernels.kv_cache import CacheType
from elute.model.families import op_list

LINEAR = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 192)
HEAD = 64 * 80
PADDED_HEAD = 64 * 96  # whole panels of 32 outputs


def counted(config=TINY, **recipe):
    ops = op_list(config)
    return traffic(ops, RandomWeights(ops, random_recipe(outer_bits=8, **recipe)))


def test_a_step_reads_every_linear_matrix_and_the_head_once():
    found = counted(bits=4, group_size=32)
    assert found.linear_weights == LINEAR
    assert found.head_weights == HEAD
    assert found.step_bytes == LINEAR * 4.5 / 8 + PADDED_HEAD * 8.5 / 8
    assert found.n_params == LINEAR + HEAD + 5 * 64
    assert found.model_bytes == found.step_bytes + 4 * 5 * 64


def test_a_step_reads_the_experts_that_it_picks_and_the_routers():
    mixture = {
        **TINY,
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "mlp_only_layers": [0],
        "head_dim": 16,
    }
    found = counted(mixture, bits=4, group_size=32)
    attention, dense, expert = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 192, 3 * 64 * 64
    router, norms = 8 * 64, 5 * 64 + 2 * 2 * 16
    used = 2 * attention + dense + 2 * expert
    assert found.linear_weights == used + router
    assert found.step_bytes == used * 4.5 / 8 + PADDED_HEAD * 8.5 / 8 + 4 * router
    assert found.n_params == used + 6 * expert + HEAD + router + norms
    assert found.model_bytes == found.step_bytes + 6 * expert * 4.5 / 8 + 4 * norms


def test_an_untied_embedding_is_part_of_the_model_but_not_of_a_step():
    tied, untied = counted(bits=4), counted({**TINY, "tie_word_embeddings": False}, bits=4)
    assert untied.step_bytes == tied.step_bytes
    assert untied.model_bytes == tied.model_bytes + PADDED_HEAD * 8.5 / 8


def test_the_cache_of_earlier_positions_is_read_too():
    found = counted(bits=4)
    position = 2 * 2 * 32  # keys and values of two heads of 16, f16
    assert found.layers == (CachedLayer(position, None),) * 2
    assert found.bytes_per_token(1, 0) == found.step_bytes + 2 * position
    assert found.bytes_per_token(3, 10) == found.step_bytes + 2 * position * 12
    assert found.cache_bytes(100) == 100 * 2 * position
    windowed = dataclasses.replace(found, layers=(CachedLayer(position, 5),))
    assert windowed.bytes_per_token(4, 3) == found.step_bytes + position * (4 + 5 + 5 + 5) / 4


def test_a_q8_cache_reads_codes_and_two_scales_a_head():
    ops = op_list(TINY)
    weights = RandomWeights(ops, random_recipe(bits=4, outer_bits=8))
    found = traffic(ops, weights, CacheType.Q8)
    assert found.layers == (CachedLayer(2 * (16 + 16 + 2 * 4), None),) * 2


def test_a_prompt_multiplies_all_but_the_head_for_every_token():
    assert counted(bits=4).prompt_operations(512) == 2 * (512 * LINEAR + HEAD)


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"bits": 8, "group_size": 32}, "8-bit g32"),
        ({"bits": 4, "group_size": 32}, "4-bit g32; head 8-bit g32"),
        ({"bits": 1, "group_size": 32}, "1-bit+offset g32; head 8-bit g32"),
        ({"bits": None, "group_size": 16}, "ternary g16; head 8-bit g32"),
        ({"bits": None, "group_size": None}, "ternary row; head 8-bit g32"),
    ],
)
def test_storage_is_told_in_short(recipe, told):
    ops = op_list(TINY)
    weights = RandomWeights(ops, random_recipe(outer_bits=8, **recipe))
    assert stored_as(ops, weights) == told
