"""The row of llama-cpp-python, where the library is installed; faults of it, everywhere."""

import pytest

from elute.bench.end_to_end import SpeedTest
from elute.bench.llama_cpp import STAND_IN, LlamaCpp, find_llama_bench
from elute.bench.random_gguf import random_gguf
from elute.bench.shapes import CONFIGS
from elute.errors import EluteError

SMALL = {
    **CONFIGS["llama-2-7b"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 96,
}


def test_the_library_stands_in_for_the_program(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("elute.bench.llama_cpp.PYTHON_PACKAGE", "json")  # one that is there
    assert find_llama_bench() == STAND_IN


def test_a_run_through_the_library_is_a_row_of_llama_bench(tmp_path):
    pytest.importorskip("llama_cpp")
    rival = LlamaCpp(STAND_IN, random_gguf("small", SMALL, "Q4_0", tmp_path).path, timeout_s=60)
    assert rival(SpeedTest(16, 0), 1) > 0
    assert rival(SpeedTest(0, 4, 8), 2) > 0
    assert rival.on_cpu
    assert rival.stored == "Q4_0"
    assert rival.told("build_commit").startswith("llama-cpp-python ")


def test_a_file_that_is_no_model_is_told(tmp_path):
    pytest.importorskip("llama_cpp")
    file = tmp_path / "no.gguf"
    file.write_bytes(b"GGUF" * 9)
    with pytest.raises(EluteError, match="cannot be loaded"):
        LlamaCpp(STAND_IN, file, timeout_s=60)(SpeedTest(16, 0), 1)
