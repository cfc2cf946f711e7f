from typing import Any

import numpy as np
import numpy.typing as npt

emulates_avx512: bool

def isas() -> list[str]: ...
def best_isa() -> str: ...
def quantize_activations(
    isa: str, x: npt.NDArray[np.float32]
) -> tuple[Any, Any, Any, Any, Any]: ...
def lut_matmul(
    isa: str,
    x: npt.NDArray[np.float32],
    planes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float16],
    offsets: npt.NDArray[np.float16] | None,
    n: int,
    bits: int,
    group_size: int,
    zero: int,
    affine: str,
    bias: npt.NDArray[np.float32] | None = None,
    lookup: bool = True,
) -> npt.NDArray[np.float32]: ...
def lut_dequant(
    isa: str, planes: npt.NDArray[np.uint8], n: int, k: int, bits: int
) -> npt.NDArray[np.uint8]: ...
def dequant_rows(
    planes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float16],
    offsets: npt.NDArray[np.float16] | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    affine: str,
) -> npt.NDArray[np.float32]: ...

class Executor:
    def __init__(
        self,
        isa: str,
        n_threads: int,
        context: int,
        chunk: int,
        n_layers: int,
        n_kv_heads: int,
        head_width: int,
    ) -> None: ...
    def add_register(self, width: int) -> int: ...
    def add_matrix(
        self,
        planes: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.float16],
        offsets: npt.NDArray[np.float16] | None,
        n: int,
        k: int,
        bits: int,
        group_size: int,
        zero: int,
        affine: str,
    ) -> int: ...
    def add_rope_table(self, inverse_frequencies: list[float], factor: float) -> int: ...
    def embed(self, matrix: int, output: int, scale: float) -> None: ...
    def rms_norm(
        self, input: int, output: int, weight: list[float], n_runs: int, eps: float
    ) -> None: ...
    def linear(
        self,
        input: int,
        matrices: list[int],
        outputs: list[int],
        biases: list[list[float]],
        columns: list[int],
    ) -> None: ...
    def rope(self, register: int, head_width: int, table: int) -> None: ...
    def attention(
        self,
        query: int,
        key: int,
        value: int,
        output: int,
        layer: int,
        n_heads: int,
        n_kv_heads: int,
        head_width: int,
        scale: float,
        window: int,
        softcap: float,
    ) -> None: ...
    def gate(self, gate: int, up: int, output: int, activation: str) -> None: ...
    def add(self, input: int, output: int) -> None: ...
    def head(self, input: int, matrix: int, columns: list[int], softcap: float) -> None: ...
    def finish(self) -> None: ...
    def forward(
        self,
        tokens: npt.NDArray[np.int32],
        position: int,
        all_logits: bool = False,
        want_logits: bool = True,
    ) -> Any: ...
