from typing import Any

import numpy as np
import numpy.typing as npt

_F32 = npt.NDArray[np.float32]
_I8 = npt.NDArray[np.int8]
_F16 = npt.NDArray[np.float16]
_I32 = npt.NDArray[np.int32]
_I64 = npt.NDArray[np.int64]
_U8 = npt.NDArray[np.uint8]
_U32 = npt.NDArray[np.uint32]

emulates_avx512: bool

def isas() -> list[str]: ...
def best_isa() -> str: ...
def return_freed_memory() -> None: ...
def quantize_activations(isa: str, x: _F32) -> tuple[npt.NDArray[np.int8], _F32, _I32, _U8, _I32]:
    """x f32 [M, K] -> q, scales, sums of 16, tables, lows of 16"""

def lut_matmul(
    isa: str,
    x: _F32,
    planes: _U8,
    scales: _F16,
    offsets: _F16 | None,
    n: int,
    bits: int,
    group_size: int,
    zero: int,
    affine: str,
    bias: _F32 | None = None,
    lookup: bool = True,
    direct: bool = False,
) -> _F32: ...
def channel_matmul(
    isa: str,
    x: _F32,
    active: npt.NDArray[np.uint64],
    rows: _U8,
    scales: _F16,
    offsets: _F16 | None,
    n: int,
    bits: int,
    group_size: int,
    zero: int,
    affine: str,
    offset: int = 0,
    bias: _F32 | None = None,
) -> _F32: ...
def channel_gemm(
    isa: str,
    x: _F32,
    rows: _U8,
    scales: _F16,
    offsets: _F16 | None,
    n: int,
    bits: int,
    group_size: int,
    zero: int,
    affine: str,
    offset: int = 0,
    bias: _F32 | None = None,
) -> _F32: ...
def multiplies_directly(isa: str) -> bool: ...
def lut_dequant(isa: str, planes: _U8, n: int, k: int, bits: int) -> _U8: ...
def dequant_rows(
    planes: _U8,
    scales: _F16,
    offsets: _F16 | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    affine: str,
) -> _F32: ...
def column_squares(
    isa: str,
    planes: _U8,
    scales: _F16,
    offsets: _F16 | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    affine: str,
) -> npt.NDArray[np.float64]:
    """-> f64 [K], the sum of w[n, k]^2 over n, stored column order"""

def race_seconds(isa: str, bits: int, rows: list[int], budget_s: float) -> npt.NDArray[np.float64]:
    """-> seconds f64 [rounds, rows, 2] of lookup and multiply"""

class float_kernels:
    def __init__(self, isa: str) -> None: ...
    def rms_norm(self, x: _F32, w: _F32, eps: float) -> _F32: ...
    def dot(self, x: _F32, w: _F32) -> _F32: ...
    def rope(self, x: _F32, cos: _F32, sin: _F32) -> None: ...
    def gate(self, gate: _F32, up: _F32, activation: str) -> _F32: ...
    def add(self, x: _F32, y: _F32) -> None: ...
    def scale(self, x: _F32, s: float) -> None: ...
    def softcap(self, x: _F32, cap: float) -> None: ...
    def block_peaks(self, x: _F32) -> tuple[bool, _F32]: ...
    def masses(self, x: _F32, peak: float, inverse_temperature: float) -> _F32: ...
    def block_masses(
        self, x: _F32, peak: float, inverse_temperature: float
    ) -> npt.NDArray[np.float64]: ...
    def to_f16(self, x: _F32) -> _F16: ...
    def from_f16(self, x: _F16) -> _F32: ...
    def cache_write(
        self, cache: _U8, key: _F32, value: _F32, position: int, cache_type: str
    ) -> None: ...
    def attention(
        self,
        cache: _U8,
        query: _F32,
        positions: _I32,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        by_spans: bool = False,
        *,
        cache_type: str,
    ) -> _F32: ...

ATTENTION_ROWS: int
ATTENTION_SPAN: int

def cache_tile_bytes(cache_type: str, head_width: int) -> int: ...

class WeightStream:
    @property
    def reader(self) -> str: ...
    @property
    def direct(self) -> bool: ...
    @property
    def failure(self) -> str: ...
    def figures(self) -> tuple[int, float]: ...
    def events(self) -> _I64: ...
    def read_through(self, first_pass: int, passes: int) -> float: ...
    def load(self) -> None: ...

def open_stream(
    paths: list[str],
    pieces: list[tuple[int, int, int, int]],
    window: _U8,
    reader: str = "auto",
    depth: int = 8,
    request_bytes: int = 1 << 20,
    direct: bool = True,
    sums: _U32 | None = None,
    first_page: list[int] = ...,
) -> WeightStream: ...

class Fetch:
    def wait(self) -> None:
        """Returns when all pieces are there; RuntimeError when one cannot be read."""

class Fetcher:
    """Reads pieces of files when somebody asks for them, while he goes on."""

    def __init__(
        self,
        paths: list[str],
        reader: str,
        depth: int,
        request_bytes: int,
        direct: bool = True,
        sums: _U32 | None = None,
        first_page: list[int] = ...,
    ) -> None: ...
    @property
    def reader(self) -> str: ...
    @property
    def direct(self) -> bool: ...
    def figures(self) -> tuple[int, int]:
        """(bytes, requests) asked for so far"""

    def begin(self, pieces: list[tuple[int, int, int, int]], memory: _U8) -> Fetch:
        """pieces (file, offset, n_bytes, at) into memory [n], which the fetch keeps"""

def time_reads(
    path: str,
    offsets: list[int],
    n_bytes: int,
    depth: int,
    memory: _U8,
    budget_s: float,
    reader: str = "auto",
    direct: bool = True,
) -> tuple[int, float, str]:
    """-> (reads, seconds, the reader's name)"""

def crc32c_levels() -> list[str]: ...
def crc32c(data: _U8, level: str | None = None) -> int: ...
def crc32c_pages(data: _U8, level: str | None = None) -> _U32: ...
def bad_pages(
    path: str,
    first: int,
    wanted: _U32,
    reader: str = "auto",
    depth: int = 8,
    request_bytes: int = 1 << 20,
    direct: bool = True,
) -> list[tuple[int, int, int]]:
    """-> (page, errno, sum); errno -1: beyond the end of the file"""

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
        cache_type: str,
    ) -> None: ...
    def add_register(self, width: int) -> int: ...
    def add_matrix(
        self,
        planes: _U8,
        scales: _F16,
        offsets: _F16 | None,
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
        mask: int = -1,
        use: int = -1,
    ) -> None:
        """use: of the banks that the matrices, of add_channel_matrix, lie in; -1: of add_matrix"""

    def add_channel_matrix(
        self,
        banks: BankCache,
        bank: int,
        offset: int,
        scales: _F16,
        offsets: _F16 | None,
        n: int,
        k: int,
        bits: int,
        group_size: int,
        zero: int,
        affine: str,
    ) -> int: ...
    def add_mask(self, width: int) -> int: ...
    def set_mask(self, mask: int, importance: list[float], threshold: float) -> None:
        """Channels with |x| * importance < threshold are 0; an empty importance: none is."""

    def set_cache_aware(self, share: float) -> None: ...
    def observe(self, on: bool) -> None: ...
    def histogram(self, mask: int) -> npt.NDArray[np.int64]:
        """Scores since observe(True), by the upper 13 bits of their f32"""

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
    def router(self, input: int, weight: _F32, output: int) -> None: ...
    def experts(
        self,
        input: int,
        logits: int,
        output: int,
        gates: list[int],
        ups: list[int],
        downs: list[int],
        top_k: int,
        normalized: bool,
        activation: str,
        use: int = -1,
        banks: BankCache | None = None,
        ahead: _F32 | None = None,
    ) -> None:
        """use: of banks, a row of which is an expert, whose matrices are of the placeholder;
        ahead: the router of the next layer"""

    def add(self, input: int, output: int) -> None: ...
    def head(self, input: int, matrix: int, columns: list[int], softcap: float) -> None: ...
    def finish(self, lookup_rows: list[int]) -> None: ...
    def stream(self, stream: WeightStream, pieces: list[int]) -> None: ...
    def forward(
        self,
        tokens: _I32,
        position: int,
        all_logits: bool = False,
        want_logits: bool = True,
    ) -> _F32 | None: ...
    def cut(self, linears: list[int], n_rows: int) -> None:
        """Where a forward is cut into segments: at the products of these calls of linear(),
        ascending; n_rows chunks of tokens may be under way.

        A segment leaves the input of the product at its end in its register, and the next one finds
        the outputs there, bias included; or, whole, each makes that product itself."""

    def run_segment(
        self,
        segment: int,
        whole: bool,
        rows: int,
        tokens: _I32,
        position: int,
        all_logits: bool = False,
        want_logits: bool = False,
    ) -> _F32 | None: ...
    def register_of(self, rows: int, register: int) -> _F32:
        """f32 [chunk, width], memory of the executor"""

class BankCache:
    reader: str
    direct: bool
    failure: str
    def figures(self) -> dict[str, Any]: ...
    def events(self) -> _I64: ...
    def last(self, use: int) -> npt.NDArray[np.uint64]: ...
    def present(self, use: int) -> npt.NDArray[np.uint64]: ...

def open_banks(
    paths: list[str],
    banks: list[tuple[int, int, int, int, int, int, int]],
    uses: list[tuple[int, int]],
    slots: _U8,
    staging: _U8,
    reader: str,
    depth: int,
    request_bytes: int,
    gap_bytes: int,
    direct: bool,
    predictor: str,
    sums: npt.NDArray[np.uint32] | None = None,
    first_page: list[int] = ...,
) -> BankCache:
    """banks (file, offset, block_bytes, row_bytes, rows, rows a block, slots); uses (bank, use
    that predicts it)"""

def resident_banks(
    arrays: list[_U8],
    banks: list[tuple[int, int, int, int, int, int, int]],
    uses: list[tuple[int, int]],
) -> BankCache: ...

class Sampler:
    """Its twin in numpy, elute.kernels.sampling.reference.Sampler, says what everything means."""

    def __init__(
        self,
        isa: str,
        vocabulary: int,
        inverse_temperature: float,
        top_k: int,
        top_p: float,
        gap: float,
        repetition: float,
        presence: float,
        frequency: float,
        prompt: _I32,
        biases: list[tuple[int, float]],
    ) -> None: ...
    def choose(self, logits: _F32, uniform: float) -> int: ...
    def best(self, logits: _F32, n: int) -> tuple[float, float, list[int]]: ...

def split_outliers(isa: str, x: _F32, scale: float) -> tuple[_I8, _I32, _I32, _I32]:
    """x f32 [M, K] -> q i8 [M, K], starts i32 [M + 1], channels, residuals; see npu/reference.py"""

def weight_columns(
    isa: str,
    channels: _I32,
    weight_scales: _F32,
    planes: _U8,
    scales: _F16,
    offsets: _F16 | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    affine: str,
) -> _I8:
    """-> i8 [C, N], rows of Wq.T of stored columns; padding of the planes unseen"""

def weight_columns_of_rows(
    isa: str,
    rows: _U8,
    channels: _I32,
    weight_scales: _F32,
    scales: _F16,
    offsets: _F16 | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    affine: str,
    offset: int = 0,
) -> _I8:
    """The same of rows u8 [C, bytes] in channel order, of the matrix from byte `offset` of each"""

def weight_rows(
    isa: str,
    outputs: _I32,
    weight_scales: _F32,
    planes: _U8,
    scales: _F16,
    offsets: _F16 | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    affine: str,
) -> _I8:
    """-> i8 [R, K], rows of Wq in stored order of columns; padding of the planes unseen"""

def shadow_product(
    isa: str, starts: _I32, slots: _I32, residuals: _I32, rows: _I8, out: _I32 | None = None
) -> _I32 | _I64:
    """-> i32 [M, N], in `out` where it is given; a new i64 one where a sum may not fit"""

def saturated_products(
    isa: str,
    q: _I8,
    starts: _I32,
    channels: _I32,
    residuals: _I32,
    rows: _I8,
    at_rows: _I32,
    at_slots: _I32,
) -> _I64:
    """-> (clip(q) + r)[at_rows[i]] . rows[at_slots[i]]"""

def finish_product(
    isa: str,
    result: npt.NDArray[Any],
    shadow: _I32 | _I64 | None,
    scales: _F32,
    bias: _F32 | None,
    y: _F32,
    output_scale: float = 0.0,
) -> None:
    """y f32 [M, N], whose rows may be strided; see npu/reference.py"""

MOST_STREAMS: int

def read_gb_s(isa: str, n_threads: int, data: _U8, n_streams: int) -> tuple[float, int]:
    """-> GB/s, or of all words"""

def multiply_gops(isa: str, n_threads: int) -> float: ...
def fma_gflops(isa: str, n_threads: int) -> float: ...
def matmul_seconds(
    isa: str,
    n_threads: int,
    x: _F32,
    planes: _U8,
    scales: _F16,
    offsets: _F16 | None,
    n: int,
    bits: int,
    group_size: int,
    zero: int,
    affine: str,
    repeats: int,
    lookup: bool,
) -> tuple[list[float], _F32, str]:
    """planes u8 [copies, bytes + padding], scales f16 [copies, n_panels, groups, PANEL]
    -> seconds of each product, the last y, the name of the kernel"""
