"""The law and the arithmetic of lut_matmul, in numpy; csrc/kernels/matmul_body.h is its twin."""

from __future__ import annotations

import numpy as np

from elute.kernels.activations import Activations, build_tables, quantize_activations
from elute.pack import quads
from elute.types import ACT_BLOCK, F32, I32, LUT_WIDTH, U8, Affine, PackedMatrix


def segments(n_columns: int, group_size: int) -> list[tuple[int, int]]:
    """-> [start, stop) column ranges that share both a weight group and an activation block."""
    step = min(group_size, ACT_BLOCK) if ACT_BLOCK % min(group_size, ACT_BLOCK) == 0 else ACT_BLOCK
    return [(at, min(at + step, n_columns)) for at in range(0, n_columns, step)]


def dot_by_lookup(activations: Activations, planes: U8, shape: tuple[int, int], bits: int,
                  start: int, stop: int) -> I32:  # fmt: skip
    """sum over columns [start, stop) of code * q, by table lookup only. -> i32 [M, N]."""
    codes = quads.unpack_codes(planes, shape, bits)[:, start:stop]
    tables = build_tables(activations)
    first, last = start // LUT_WIDTH, stop // LUT_WIDTH
    total = np.zeros((activations.q.shape[0], shape[0]), np.int64)
    for plane in range(bits):
        bit = (codes >> plane & 1).reshape(shape[0], -1, LUT_WIDTH)
        nibble = (bit << np.arange(LUT_WIDTH, dtype=np.uint8)).sum(axis=-1)  # [N, quads]
        for quad in range(first, last):
            looked_up = tables.entries[:, quad][:, nibble[:, quad - first]].astype(np.int64)
            total += looked_up << plane
    lows = tables.lows[:, first:last].sum(axis=1, dtype=np.int64)
    total += ((1 << bits) - 1) * lows[:, None]
    return total.astype(np.int32)


def dot_by_multiply(activations: Activations, planes: U8, shape: tuple[int, int], bits: int,
                    start: int, stop: int) -> I32:  # fmt: skip
    """The same sum as dot_by_lookup, as a plain integer product. Law 1: the two are equal."""
    codes = quads.unpack_codes(planes, shape, bits)[:, start:stop].astype(np.int32)
    return activations.q[:, start:stop].astype(np.int32) @ codes.T


def matmul(activations: Activations, packed: PackedMatrix, *, by_lookup: bool = True) -> F32:
    """y f32 [M, N] from quantized activations, floats in the order that all kernels keep:

    group = sum of activation_scale * float(dot) over the group's segments, left to right
    y    += scale * group                       SYMMETRIC, dot taken of code - zero
    y    += scale * (group - offset * x_sum)    ZERO       x_sum = the same sum over q alone
    y     = (y + scale * group) + offset * x_sum    MIN
    """
    n, k = packed.shape
    dot = dot_by_lookup if by_lookup else dot_by_multiply
    scales = quads.unpack_groups(packed.scales, n).astype(np.float32)
    offsets = (
        None
        if packed.offsets is None
        else quads.unpack_groups(packed.offsets, n).astype(np.float32)
    )
    m = activations.q.shape[0]
    y = np.zeros((m, n), np.float32)
    group_sum = np.zeros((m, n), np.float32)
    x_sum = np.zeros((m, 1), np.float32)
    for start, stop in segments(k, packed.group_size):
        group = start // packed.group_size
        act_scale = activations.scales[:, start // ACT_BLOCK][:, None]
        q_sum = activations.q[:, start:stop].sum(axis=1, dtype=np.int32)[:, None]
        code_dot = dot(activations, packed.planes, packed.shape, packed.bits, start, stop)
        if packed.affine is Affine.SYMMETRIC:
            code_dot = code_dot - packed.zero * q_sum
        group_sum = group_sum + act_scale * code_dot.astype(np.float32)
        x_sum = x_sum + act_scale * q_sum.astype(np.float32)
        if stop == (group + 1) * packed.group_size or stop == k:
            if packed.affine is Affine.SYMMETRIC:
                y = y + scales[group] * group_sum
            elif packed.affine is Affine.ZERO:
                assert offsets is not None
                y = y + scales[group] * (group_sum - offsets[group] * x_sum)
            else:
                assert offsets is not None
                y = (y + scales[group] * group_sum) + offsets[group] * x_sum
            group_sum = np.zeros_like(group_sum)
            x_sum = np.zeros_like(x_sum)
    return y


def lut_matmul(x: F32, packed: PackedMatrix) -> F32:
    """y[M, N] = x[M, K] @ w[N, K].T with int8 activations; see matmul for the exact arithmetic."""
    if packed.columns is not None:
        x = x[:, packed.columns]
    return matmul(quantize_activations(x), packed)
