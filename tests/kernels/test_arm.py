"""The program on emulated ARM CPUs: which level each gets, and that models run right on it.

The kernels one by one are tested with those of the other levels, in test_matmul.py,
test_float_kernels.py and test_attention.py.
"""

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import levels
import numpy as np
import pytest
from emulated import ROOT, KernelServer, missing
from matrices import random_matrix
from test_executor import Made, check_against_reference, made, reference, some_tokens

from elute.kernels.lut_matmul import reference as lut_matmul
from elute.kernels.registry import Kernel
from elute.pack import quads
from elute.runtime import executor
from elute.types import Affine

__all__ = ["made"]  # a fixture

why_not = missing()
pytestmark = pytest.mark.skipif(why_not is not None, reason=str(why_not))

# Neither dot products nor i8mm; dot products; both.
LEVELS_OF = {
    "cortex-a72": ["scalar"],
    "cortex-a76": ["scalar", "neon"],
    "max": ["scalar", "neon", "neon_i8mm"],
}
each_cpu = pytest.mark.parametrize("cpu", LEVELS_OF)


@each_cpu
def test_a_cpu_gets_the_levels_that_it_has(cpu: str) -> None:
    server = levels.server(cpu)
    assert server.isas() == LEVELS_OF[cpu]
    assert server.best_isa() == LEVELS_OF[cpu][-1]


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_portable_level_is_right_on_a_cpu_without_dot_products(bits: int) -> None:
    server: KernelServer = levels.server("cortex-a72")
    matrix = random_matrix(45, 192, bits=bits, group_size=64, affine=Affine.MIN, seed=bits)
    packed = quads.pack(matrix)
    x = np.random.default_rng(bits).standard_normal((3, 192)).astype(np.float32)
    want = lut_matmul.lut_matmul(x, packed)
    for lookup in (True, False):
        got = server.lut_matmul(
            "scalar", x, planes=np.pad(packed.planes, (0, 64)), scales=packed.scales,
            offsets=packed.offsets, n=45, bits=bits, group_size=64, zero=0, affine="min",
            lookup=lookup,
        )  # fmt: skip
        assert np.array_equal(got, want)


@each_cpu
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("kernel", [Kernel.LOOKUP, Kernel.MULTIPLY])
def test_a_model_runs_as_the_reference_does(
    cpu: str,
    family: str,
    kernel: Kernel,
    made: Callable[..., Made],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(executor, "_native", levels.server(cpu))
    model = made(family)
    tokens = some_tokens(24, model[0].vocabulary)
    runner = executor.Executor(model[0], model[1], n_threads=2, kernel=kernel)
    got = runner.forward(tokens, 0, all_logits=True)
    check_against_reference(got, reference(model, tokens))


@pytest.mark.parametrize("cpu", ["cortex-a76", "max"])
def test_cuts_threads_and_kernels_do_not_change_a_bit(
    cpu: str, made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "_native", levels.server(cpu))
    ops, source, _ = made("llama")
    tokens = some_tokens(75, ops.vocabulary)
    runner = executor.Executor(ops, source, n_threads=1, kernel=Kernel.MULTIPLY)
    whole = runner.forward(tokens, 0, all_logits=True)
    for n_threads, cuts, kernel in (
        (1, [1, 2, 5, 70], Kernel.LOOKUP),
        (2, [1, 7, 8], Kernel.MULTIPLY),
        (3, [3, 40], Kernel.LOOKUP),
    ):
        runner = executor.Executor(ops, source, n_threads=n_threads, kernel=kernel)
        at = 0
        for cut in [*cuts, tokens.size]:
            part = runner.forward(tokens[at:cut], at, all_logits=True)
            assert np.array_equal(part, whole[at:cut]), (n_threads, kernel, at, cut)
            at = cut


def test_instructions_are_counted(tmp_path: Path) -> None:
    """What the kernels cannot do without, exactly: 16 lookups an instruction, 16 products or 32."""
    if any(shutil.which(tool) is None for tool in ("gcc", "aarch64-linux-gnu-objdump")):
        pytest.skip("needs gcc and aarch64-linux-gnu-objdump (binutils-aarch64-linux-gnu)")
    name = "arm_instructions"
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[name] = script  # where dataclasses look for it
    spec.loader.exec_module(script)
    counter, n_weights = script.Counter(tmp_path), script.N * script.K
    decode = counter.product("neon", 3, 1)
    assert decode.by_name["lookup"] == 3 * n_weights / 64
    assert 0 < decode.cycles() < decode.total
    for isa, products in (("neon", 16), ("neon_i8mm", 32)):
        counts = counter.product(isa, 4, 4)
        assert counts.by_name["dot"] == 4 * n_weights / products
        assert counts.by_name["lookup"] == 0
