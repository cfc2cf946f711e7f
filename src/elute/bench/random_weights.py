"""Random weights of a real shape, in memory, for timings that do not depend on values.

Every matrix has memory of its own, so that a token reads as much of it as in a real model. Nothing
is written to disk.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from elute.bench.machine import available_bytes
from elute.errors import BudgetError
from elute.flash.weights import pages
from elute.model.ops import OpList
from elute.model.weights import weight_shapes
from elute.pack.quads import planes_bytes
from elute.quantize.recipe import DEFAULT_GROUP, EMBEDDING, HEAD, Recipe, Rule, Scheme
from elute.types import F16, F32, OVER_READ, PANEL, U8, Affine, PackedMatrix

log = logging.getLogger(__name__)

# Planes are cut from one block of random bytes at changing places: copying is several times as
# fast as drawing, and no kernel's time depends on which codes it meets.
BLOCK_BYTES = 4 << 20
RANDOM_BYTES = 3 * BLOCK_BYTES  # what drawing holds beside the weights
BLOCK_STEP = (1 << 16) + 4096  # from the place of one copy in the block to that of the next
TERNARY_ZERO = 1
F16_BIAS, F16_MANTISSA_BITS, F16_LEAST_EXPONENT = 15, 10, -14


def random_recipe(
    *, bits: int | None, group_size: int | None = DEFAULT_GROUP, outer_bits: int
) -> Recipe:
    """Every linear layer alike; the embedding and the head at outer_bits, in the default groups.

    bits        None for ternary: -1, 0 and 1 in two bits
    group_size  None for one scale a row
    """
    outer = Rule(EMBEDDING, bits=outer_bits)
    scheme = Scheme.TERNARY if bits is None else Scheme.SYMMETRIC
    inner = Rule("*", bits=bits or 2, group_size=group_size, scheme=scheme)
    return Recipe((outer, replace(outer, match=HEAD), inner))


class RandomWeights:
    """A WeightSource: random codes, small positive scales, norms of one, biases of zero, random
    routers.

    A matrix multiplies the size of its input by about one, so hidden states and logits stay finite.
    planes: u8 of matrices whose planes somebody else holds, whatever is in them; as long as they
    are, or longer. Raises BudgetError, before taking memory, when it is not there.
    """

    def __init__(
        self, ops: OpList, recipe: Recipe, *, planes: Mapping[str, U8] | None = None
    ) -> None:
        given = planes or {}
        shapes = weight_shapes(ops)
        rules = {
            name: recipe.rule_for(name).for_columns(shapes[name][1], where=name)
            for name in ops.matrices()
        }
        regrouped: Counter[tuple[int | None, int | None]] = Counter(
            (recipe.rule_for(name).group_size, rule.group_size)
            for name, rule in rules.items()
            if recipe.rule_for(name).group_size not in (None, rule.group_size)
        )
        for (wanted, used), n in regrouped.items():
            log.warning(
                "%d random matrices take group_size=%d, because %d does not fit their rows",
                n,
                used,
                wanted,
            )
        self._vectors = {name: shapes[name] for name in ops.vectors()}
        self._norms = {name for name in self._vectors if not name.endswith(".bias")}
        self._random = np.random.Generator(np.random.PCG64(0))
        self._blocks: dict[bool, U8] = {}
        self._next_in_block = 0
        check_memory(
            sum(
                _matrix_bytes(_sides(shapes[name]), rule, with_planes=name not in given)
                for name, rule in rules.items()
            ),
            "the weights",
        )
        self._matrices = {
            name: self._random_matrix(_sides(shapes[name]), rule, given.get(name))
            for name, rule in rules.items()
        }

    def matrix(self, name: str) -> PackedMatrix:
        return self._matrices[name]

    def vector(self, name: str) -> F32:
        shape = self._vectors[name]
        if len(shape) == 2:  # a router: equal logits would send all rows to the same experts
            return self._random.standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[1]))
        return np.full(shape, name in self._norms, np.float32)

    def _random_matrix(self, shape: tuple[int, int], rule: Rule, planes: U8 | None) -> PackedMatrix:
        n, k = shape
        assert rule.group_size is not None
        ternary = rule.scheme is Scheme.TERNARY
        affine = _affine(rule)
        zero = 0
        if affine is Affine.SYMMETRIC:
            zero = TERNARY_ZERO if ternary else 1 << (rule.bits - 1)
        scales = self._random_scales(shape, rule)
        middle = np.float16(-((1 << rule.bits) - 1) / 2)
        n_bytes = planes_bytes(n, k, rule.bits)
        if planes is None:
            planes = self._random_planes(n_bytes, ternary=ternary)
        return PackedMatrix(
            shape=shape,
            planes=planes[:n_bytes],
            scales=scales,
            offsets=scales * middle if affine is Affine.MIN else None,
            affine=affine,
            zero=zero,
            bits=rule.bits,
            group_size=rule.group_size,
        )

    def _random_planes(self, n_bytes: int, *, ternary: bool) -> U8:
        """-> u8 [n_bytes], OVER_READ more bytes behind them."""
        block = self._block(ternary)
        planes: U8 = np.empty(n_bytes + OVER_READ, np.uint8)
        for start in range(0, planes.size, BLOCK_BYTES):
            part = planes[start : start + BLOCK_BYTES]
            part[:] = block[self._next_in_block : self._next_in_block + part.size]
            self._next_in_block = (self._next_in_block + BLOCK_STEP) % BLOCK_BYTES
        return planes[:n_bytes]

    def _block(self, ternary: bool) -> U8:
        """Two blocks' length of random bytes; ternary ones hold no code 3."""
        if ternary not in self._blocks:
            block = self._random.integers(0, 256, 2 * BLOCK_BYTES, dtype=np.uint8)
            if ternary:  # bytes of plane 0 and of plane 1 alternate; code 3 has both bits
                block[1::2] &= ~block[0::2]
            self._blocks[ternary] = block
        return self._blocks[ternary]

    def _random_scales(self, shape: tuple[int, int], rule: Rule) -> F16:
        """-> f16 [n_panels, K/group_size, PANEL] in [s, 2s), s about 1 / (sqrt(K) * 2**bits)."""
        n, k = shape
        exponent = max(F16_LEAST_EXPONENT, -round(math.log2(k) / 2 + rule.bits))
        first = (exponent + F16_BIAS) << F16_MANTISSA_BITS
        size = (_n_panels(n), k // (rule.group_size or k), PANEL)
        bits = self._random.integers(first, first + (1 << F16_MANTISSA_BITS), size, np.uint16)
        bits[-1, :, n - (size[0] - 1) * PANEL :] = 0  # outputs that only fill the last panel
        return bits.view(np.float16)


def side_by_side(sizes: Mapping[str, int]) -> dict[str, U8]:
    """Random planes of so many bytes each, in one piece of memory, as flash/weights.py holds them:
    on huge pages, which small matrices with memory of their own do not get.

    Raises BudgetError, before taking memory, when it is not there.
    """
    total = sum(sizes.values())
    check_memory(total, "the weights")
    memory = pages(total)
    block = np.random.Generator(np.random.PCG64(0)).integers(0, 256, BLOCK_BYTES, np.uint8)
    for start in range(0, total, BLOCK_BYTES):
        part = memory[start : start + BLOCK_BYTES]
        part[:] = block[: part.size]
    found, at = {}, 0
    for name, size in sizes.items():
        found[name] = memory[at : at + size]
        at += size
    return found


def check_memory(wanted_bytes: int, what: str) -> None:
    """Raises BudgetError unless this process can take that much."""
    available = available_bytes()
    if wanted_bytes > available:
        raise BudgetError(
            f"bench: {what} take {wanted_bytes >> 20} MiB, but {available >> 20} MiB are "
            "available; use a smaller shape, fewer bits or threads, less --depth, or close programs"
        )


def _affine(rule: Rule) -> Affine:
    """As quantizing by the rule stores it: one bit has no code in the middle."""
    symmetric = rule.scheme is not Scheme.ASYMMETRIC and rule.bits > 1
    return Affine.SYMMETRIC if symmetric else Affine.MIN


def _matrix_bytes(shape: tuple[int, int], rule: Rule, *, with_planes: bool) -> int:
    n, k = shape
    per_group = 2 if _affine(rule) is Affine.SYMMETRIC else 4
    groups = _n_panels(n) * PANEL * k // (rule.group_size or k)
    planes = planes_bytes(n, k, rule.bits) + OVER_READ if with_planes else 0
    return planes + per_group * groups


def _n_panels(n: int) -> int:
    return -(-n // PANEL)


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    n, k = shape
    return n, k
