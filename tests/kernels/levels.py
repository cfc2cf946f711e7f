"""The instruction-set levels that the kernels' tests run: this CPU's, and ARM's on emulated CPUs.

Called like elute._native; the level's name says where it runs.
"""

from __future__ import annotations

import functools
from typing import Any

from emulated import KernelServer, missing

from elute import _native

# The plainest CPU that has the level: an instruction that it lacks kills the program.
EMULATED = {"neon": "cortex-a76", "neon_i8mm": "max"}


@functools.cache
def server(cpu: str) -> KernelServer:
    return KernelServer(cpu)


def isas() -> list[str]:
    return [*_native.isas(), *(EMULATED if missing() is None else ())]


def float_isas() -> list[str]:
    """Those with float kernels of their own."""
    return [isa for isa in isas() if isa != "neon_i8mm"]


def _home(isa: str) -> Any:
    return server(EMULATED[isa]) if isa in EMULATED and isa not in _native.isas() else _native


def quantize_activations(isa: str, *arguments: Any, **named: Any) -> Any:
    return _home(isa).quantize_activations(isa, *arguments, **named)


def lut_matmul(isa: str, *arguments: Any, **named: Any) -> Any:
    return _home(isa).lut_matmul(isa, *arguments, **named)


def channel_matmul(isa: str, *arguments: Any, **named: Any) -> Any:
    return _home(isa).channel_matmul(isa, *arguments, **named)


def channel_gemm(isa: str, *arguments: Any, **named: Any) -> Any:
    return _home(isa).channel_gemm(isa, *arguments, **named)


def lut_dequant(isa: str, *arguments: Any, **named: Any) -> Any:
    return _home(isa).lut_dequant(isa, *arguments, **named)


def float_kernels(isa: str) -> Any:
    return _home(isa).float_kernels(isa)


def split_outliers(isa: str, *arguments: Any) -> Any:
    return _home(isa).split_outliers(isa, *arguments)


def weight_columns(isa: str, *arguments: Any, **named: Any) -> Any:
    return _home(isa).weight_columns(isa, *arguments, **named)


def weight_columns_of_rows(isa: str, *arguments: Any, **named: Any) -> Any:
    return _home(isa).weight_columns_of_rows(isa, *arguments, **named)


def weight_rows(isa: str, *arguments: Any, **named: Any) -> Any:
    return _home(isa).weight_rows(isa, *arguments, **named)


def shadow_product(isa: str, *arguments: Any) -> Any:
    return _home(isa).shadow_product(isa, *arguments)


def saturated_products(isa: str, *arguments: Any) -> Any:
    return _home(isa).saturated_products(isa, *arguments)


def finish_product(isa: str, *arguments: Any) -> Any:
    return _home(isa).finish_product(isa, *arguments)
