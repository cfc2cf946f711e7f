import pytest

from elute.bench import machine


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("AMD Ryzen 9 7950X 16-Core Processor", "amd-ryzen-9-7950x-16-core-4-cores"),
        ("Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz", "intel-xeon-e5-2690-v4-4-cores"),
        ("AMD EPYC", "amd-epyc-family-25-model-1-4-cores"),
    ],
)
def test_a_machine_is_named_after_model_and_cores(monkeypatch, name, slug):
    facts = {"model name": name, "cpu family": "25", "model": "1"}
    monkeypatch.setattr(machine, "_cpuinfo", facts.get)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 4)
    machine.cpu_name.cache_clear()
    try:
        assert machine.machine_slug() == slug
    finally:
        machine.cpu_name.cache_clear()


def test_the_build_is_a_commit_or_else_the_version(monkeypatch):
    answers = {"rev-parse": "0a1b2c3d4", "status": ""}

    def git(folder, verb, *arguments):
        return str(folder.parent.parent) if "--show-toplevel" in arguments else answers[verb]

    monkeypatch.setattr(machine, "_git", git)
    assert machine.elute_build.__wrapped__() == "0a1b2c3d4"
    answers["status"] = " M src/elute/api.py"
    assert machine.elute_build.__wrapped__() == "0a1b2c3d4-dirty"
    monkeypatch.setattr(machine, "_git", lambda *_: None)
    assert machine.elute_build.__wrapped__()[0].isdigit()


@pytest.mark.parametrize(
    ("content", "limit"), [("1048576\n", 1 << 20), ("max\n", None), ("9223372036854771712", None)]
)
def test_the_limit_of_the_control_group(tmp_path, content, limit):
    file = tmp_path / "memory.max"
    file.write_text(content)
    assert machine.memory_limit_bytes((tmp_path / "missing", file)) == limit


def test_memory_to_be_had_is_what_the_control_group_leaves(monkeypatch):
    everything = machine.available_bytes()
    assert everything > 0
    monkeypatch.setattr(machine, "memory_limit_bytes", lambda: 1 << 62)
    assert machine.available_bytes() == pytest.approx(everything, rel=0.5)
    monkeypatch.setattr(machine, "memory_limit_bytes", lambda: 1000)
    assert machine.available_bytes() == 0
