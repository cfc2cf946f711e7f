"""The kernels of another CPU, run by an emulator: the calls of elute._native, answered by the
program that kernel_server/ builds."""

from __future__ import annotations

import fcntl
import functools
import platform
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
DTYPES = {np.dtype(c): c.encode() for c in "dfebBiq"}
FOUND = {ord(c): np.dtype(c) for c in "dfebBiq"}


def missing() -> str | None:
    """What the ARM kernels cannot be built or run for here; None where they can be."""
    tools = [tool for tool in (COMPILER, EMULATOR, "cmake", "ninja") if shutil.which(tool) is None]
    if platform.system() != "Linux" or platform.machine() == "aarch64":
        return "ARM is emulated on Linux of other architectures only"
    if tools:
        return (
            f"needs {', '.join(tools)} (Debian: g++-aarch64-linux-gnu qemu-user cmake ninja-build)"
        )
    return None


@functools.cache
def kernel_server() -> Path:
    """Builds the program, once for all processes of a test run."""
    build = ROOT / "build" / "aarch64"
    build.mkdir(parents=True, exist_ok=True)
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DELUTE_KERNEL_SERVER=ON",
    ]  # fmt: skip
    with open(build / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(build)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return build / "kernel_server"


class KernelServer:
    """One emulated CPU. Methods are those of elute._native; options are the emulator's."""

    def __init__(self, cpu: str, options: Sequence[str] = ()) -> None:
        self.command = [EMULATOR, "-cpu", cpu, *options, str(kernel_server())]
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)

    def call(self, name: str, *values: Any) -> list[Any]:
        """-> the values of the reply. Raises ValueError where the program threw."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(struct.pack("<Q", 1 + len(values)))
            self._process.stdin.write(b"".join(map(_packed, (name, *values))))
            self._process.stdin.flush()
            (count,) = struct.unpack("<Q", self._process.stdout.read(8))
        except (BrokenPipeError, struct.error):
            code = self._process.wait(timeout=10)
            raise AssertionError(f"{' '.join(self.command)}: ended with {code} in {name}") from None
        well, *reply = [_unpacked(self._process.stdout) for _ in range(count)]
        if not well:
            raise ValueError(reply[0])
        return reply

    def isas(self) -> list[str]:
        return self.call("isas")

    def best_isa(self) -> str:
        return str(self.call("best_isa")[0])

    # ---- matmul kernels

    def quantize_activations(self, isa: str, x: np.ndarray) -> list[np.ndarray]:
        return self.call("quantize_activations", isa, x)

    def lut_matmul(self, isa: str, x: np.ndarray, *, bias=None, lookup=True, **matrix):
        return self.call("lut_matmul", isa, x, *_matrix(**matrix), bias, int(lookup))[0]

    def channel_matmul(self, isa, x, active, *, rows, offset=0, bias=None, **matrix):
        values = *_matrix(rows, **matrix), offset, bias
        return self.call("channel_matmul", isa, x, active.view(np.uint8), *values)[0]

    def channel_gemm(self, isa, x, *, rows, offset=0, bias=None, **matrix):
        return self.call("channel_gemm", isa, x, *_matrix(rows, **matrix), offset, bias)[0]

    def matmul_seconds(self, isa: str, x: np.ndarray, *, repeats: int, **matrix):
        """What it takes is for a counter of instructions to find; -> the product."""
        return self.call("matmul_seconds", isa, x, *_matrix(**matrix), repeats)[0]

    def lut_dequant(self, isa: str, planes: np.ndarray, n: int, k: int, bits: int) -> np.ndarray:
        codes = self.call("lut_dequant", isa, planes, n, k, bits)[0]
        return codes.transpose(0, 2, 1, 3).reshape(-1, k)[:n]

    def float_kernels(self, isa: str) -> FloatKernels:
        return FloatKernels(self, isa)

    # ---- shadow outliers

    def split_outliers(self, isa, x, scale):
        return self.call("split_outliers", isa, x, float(scale))

    def weight_columns(self, isa, channels, weight_scales, *, k, **matrix):
        values = channels, weight_scales, k, *_matrix(**matrix)
        return self.call("weight_columns", isa, *values)[0]

    def weight_columns_of_rows(self, isa, rows, channels, weight_scales, *, k, offset=0, **matrix):
        values = channels, weight_scales, k, *_matrix(rows, **matrix), offset
        return self.call("weight_columns_of_rows", isa, *values)[0]

    def weight_rows(self, isa, outputs, weight_scales, *, k, **matrix):
        return self.call("weight_rows", isa, outputs, weight_scales, k, *_matrix(**matrix))[0]

    def shadow_product(self, isa, starts, slots, residuals, rows, out=None):
        product = self.call("shadow_product", isa, starts, slots, residuals, rows)[0]
        if out is None or product.dtype != out.dtype:
            return product
        out[...] = product
        return out

    def saturated_products(self, isa, *arrays):
        return self.call("saturated_products", isa, *arrays)[0]

    def finish_product(self, isa, result, shadow, scales, bias, y, output_scale=0.0):
        values = result, shadow, scales, bias, float(output_scale)
        y[...] = self.call("finish_product", isa, *values)[0]

    # ---- checksums

    def crc32c_levels(self) -> list[str]:
        return self.call("crc32c_levels")

    def crc32c(self, data: np.ndarray, level: str) -> int:
        return int(self.call("crc32c", level, data)[0])

    def crc32c_pages(self, data: np.ndarray, level: str) -> np.ndarray:
        return self.call("crc32c_pages", level, data)[0].view(np.uint32)

    def Executor(self, *arguments: Any) -> NativeExecutor:
        self.call("Executor", *arguments)
        return NativeExecutor(self)


class FloatKernels:
    """elute._native.float_kernels; what that changes in place is changed here by the reply."""

    def __init__(self, server: KernelServer, isa: str) -> None:
        self._call = lambda name, *values: server.call(name, isa, *values)

    def rms_norm(self, x, w, eps):
        return self._call("rms_norm", x, w, float(eps))[0]

    def dot(self, x, w):
        return self._call("dot", x, w)[0]

    def rope(self, x, cos, sin):
        x[...] = self._call("rope", x, cos, sin)[0]

    def gate(self, gate, up, activation):
        return self._call("gate", gate, up, activation)[0]

    def add(self, x, y):
        y[...] = self._call("add", x, y)[0]

    def scale(self, x, s):
        x[...] = self._call("scale", x, float(s))[0]

    def softcap(self, x, cap):
        x[...] = self._call("softcap", x, float(cap))[0]

    def block_peaks(self, x):
        finite, peaks = self._call("block_peaks", x)
        return bool(finite), peaks

    def masses(self, x, peak, inverse_temperature):
        return self._call("masses", x, float(peak), float(inverse_temperature))[0]

    def block_masses(self, x, peak, inverse_temperature):
        return self._call("block_masses", x, float(peak), float(inverse_temperature))[0]

    def to_f16(self, x):
        return self._call("to_f16", x)[0]

    def from_f16(self, x):
        return self._call("from_f16", x)[0]

    def cache_write(self, cache, key, value, position, cache_type):
        cache[...] = self._call("cache_write", cache, key, value, int(position), str(cache_type))[0]

    def attention(
        self, cache, query, positions, scale, window=0, softcap=0.0, by_spans=False, *, cache_type
    ):
        numbers = float(scale), int(window), float(softcap), int(by_spans)
        return self._call("attention", cache, query, positions, *numbers, str(cache_type))[0]


class NativeExecutor:
    """elute._native.Executor."""

    def __init__(self, server: KernelServer) -> None:
        self._server = server
        self._widths: list[int] = []

    def add_register(self, width):
        self._widths.append(width)
        return self._server.call("add_register", width)[0]

    def add_matrix(self, planes, scales, offsets, n, k, bits, group_size, zero, affine):
        # The array ends where the planes do; the bytes that kernels may read beyond are the view's.
        planes = np.concatenate([planes, np.full(64, 0xAB, np.uint8)])
        matrix = _matrix(planes, scales, offsets, n, bits, group_size, zero, affine)
        return self._server.call("add_matrix", k, *matrix)[0]

    def add_rope_table(self, inverse_frequencies, factor):
        frequencies = np.array(inverse_frequencies, np.float32)
        return self._server.call("add_rope_table", frequencies, float(factor))[0]

    def embed(self, matrix, output, scale):
        self._server.call("embed", matrix, output, float(scale))

    def rms_norm(self, input, output, weight, n_runs, eps):
        weight = np.array(weight, np.float32)
        self._server.call("rms_norm_op", input, output, weight, n_runs, float(eps))

    def add_mask(self, width):
        return -1  # nothing is masked here

    def linear(self, input, matrices, outputs, biases, columns, mask=-1):
        assert mask == -1
        lists = [np.array(ids, np.int32) for ids in (matrices, outputs, columns)]
        self._server.call("linear", input, *lists, *(np.array(b, np.float32) for b in biases))

    def rope(self, register, head_width, table):
        n_heads = self._widths[register] // head_width
        self._server.call("rope_op", register, head_width, n_heads, table)

    def attention(self, *arguments):
        *integers, scale, window, softcap = arguments
        self._server.call("attention_op", *integers, float(scale), window, float(softcap))

    def gate(self, gate, up, output, activation):
        self._server.call("gate_op", gate, up, output, activation)

    def router(self, input, weight, output):
        self._server.call("router", input, output, weight)

    def experts(self, input, logits, output, *arguments):
        *matrices, top_k, normalized, activation, use, banks, ahead = arguments
        assert (use, banks, ahead) == (-1, None, None)
        lists = [np.array(ids, np.int32) for ids in matrices]
        numbers = top_k, int(normalized), activation
        self._server.call("experts", input, logits, output, *lists, *numbers)

    def add(self, input, output):
        self._server.call("add_to", input, output)

    def head(self, input, matrix, columns, softcap):
        self._server.call("head", input, matrix, np.array(columns, np.int32), float(softcap))

    def finish(self, lookup_rows):
        self._server.call("finish", np.array(lookup_rows, np.int32))

    def forward(self, tokens, position, *, all_logits, want_logits):
        logits = self._server.call("forward", tokens, position, int(all_logits))[0]
        return logits if want_logits else None


def _matrix(planes, scales, offsets, n, bits, group_size, zero, affine) -> list[Any]:
    return [planes, scales, offsets, n, bits, group_size, zero, affine]


def _packed(value: Any) -> bytes:
    if value is None:
        return b"n"
    if isinstance(value, str):
        return b"s" + struct.pack("<Q", len(value)) + value.encode()
    if isinstance(value, np.ndarray):
        head = (
            b"a" + DTYPES[value.dtype] + struct.pack(f"<B{value.ndim}Q", value.ndim, *value.shape)
        )
        return head + value.tobytes()
    if isinstance(value, float):
        return b"f" + struct.pack("<d", value)
    return b"i" + struct.pack("<q", value)


def _unpacked(stream: Any) -> Any:
    kind = stream.read(1)
    if kind == b"i":
        return struct.unpack("<q", stream.read(8))[0]
    if kind == b"f":
        return struct.unpack("<d", stream.read(8))[0]
    if kind == b"s":
        return stream.read(struct.unpack("<Q", stream.read(8))[0]).decode()
    assert kind == b"a", kind
    dtype, ndim = stream.read(2)
    shape = struct.unpack(f"<{ndim}Q", stream.read(8 * ndim))
    size = int(np.prod(shape)) * FOUND[dtype].itemsize
    return np.frombuffer(bytearray(stream.read(size)), FOUND[dtype]).reshape(shape)
