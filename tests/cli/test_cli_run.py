import json

import pytest
from click.testing import CliRunner
from fakes import FakeExecutor

from elute import cli


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        shown = capsys.readouterr()
        return left.value.code, shown.out, shown.err

    return call


def test_run_streams_the_answer_alone_to_stdout(run, fake_load):
    code, out, err = run("run", "some/model", "who?")
    assert (code, out) == (0, "hello there\n")
    assert fake_load.calls[0]["model"] == "some/model"
    assert bytes(fake_load.executor.cache[:10]) == b"<user>who?"
    (line,) = err.splitlines()
    for figure in (
        "prompt 22 tokens",
        "generated 12 tokens",
        "tok/s",
        "first token",
        "peak memory",
        "4.50 bits a weight",
    ):
        assert figure in line


def test_quiet_run_says_nothing_else(run, fake_load):
    assert run("run", "-q", "default", "who?") == (0, "hello there\n", "")


def test_run_takes_the_default_model_when_it_is_left_out(run, fake_load):
    run("run", "who?")
    assert fake_load.calls[0]["model"] == "default"


def test_run_raw_continues_the_prompt(run, fake_load):
    run("run", "--raw", "default", "who?")
    assert bytes(fake_load.executor.cache[:4]) == b"who?"


def test_run_without_a_template_continues_the_prompt(run, fake_load):
    fake_load.template = False
    run("run", "default", "who?")
    assert bytes(fake_load.executor.cache[:4]) == b"who?"


def test_run_reads_stdin_and_a_system_message(fake_load):
    from elute.cli.application import application

    done = CliRunner().invoke(
        application, ["run", "default", "--system", "be brief", "-"], input="from stdin"
    )
    assert done.exit_code == 0, done.output
    text = bytes(t for t in fake_load.executor.cache if t < 256).decode()
    assert text.startswith("<system>be brief<user>from stdin<assistant>")


def test_a_prompt_that_is_not_utf8_is_refused(fake_load):
    from elute.cli.application import application

    done = CliRunner().invoke(application, ["run", "default", "-"], input=b"caf\xe9")
    assert "stdin: byte 3 is not UTF-8" in str(done.exception)


def test_run_passes_its_options_on(run, fake_load):
    run("run", "m", "x", "--bits", "3", "--context", "99", "--threads", "2", "--isa", "avx2")
    call = fake_load.calls[0]
    assert [call[k] for k in ("bits", "context", "threads", "isa")] == [3, 99, 2, "avx2"]


def test_run_stops_at_max_tokens_and_at_stop_strings(run, fake_load):
    assert run("run", "m", "x", "--max-tokens", "4")[1] == "hell\n"
    assert run("run", "m", "x", "--stop", "the", "--stop", "zzz")[1] == "hello \n"


def test_an_answer_that_a_limit_cut_says_so(run, fake_load):
    assert "cut at" not in run("run", "m", "x")[2]
    err = run("run", "m", "x", "--max-tokens", "4")[2]
    assert err.startswith("the answer was cut at --max-tokens 4\nprompt ")
    fake_load.context = 20
    err = run("run", "--raw", "m", "x" * 16)[2]
    assert err.startswith("the answer was cut at the end of the context, 20 tokens\nprompt ")


def test_run_ends_an_endless_answer(run, fake_load, monkeypatch):
    monkeypatch.setattr(FakeExecutor, "_next_of_script", lambda _: ord("a"))
    fake_load.context = 8192
    _, out, err = run("run", "m", "x")
    assert len(out) == 2049
    assert "cut at --max-tokens 2048" in err


def test_a_prompt_may_be_longer_than_any_file_name(run, fake_load):
    fake_load.context = 20_000
    assert run("run", "why? " * 2000)[:2] == (0, "hello there\n")


def test_run_json_is_one_object_and_no_stream(run, fake_load):
    code, out, err = run("run", "--json", "-q", "--logprobs", "2", "--seed", "7", "m", "x")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["text"] == "hello there"
    assert told["finish_reason"] == "stop"
    assert told["seed"] == 7
    assert told["generated_tokens"] == len(told["logprobs"]) == 12
    assert told["logprobs"][0]["text"] == "h"
    assert len(told["logprobs"][0]["top"]) == 2
    for key in (
        "prompt_tok_s",
        "generated_tok_s",
        "first_token_s",
        "peak_memory_bytes",
        "bits_per_weight",
        "load_s",
        "start_to_first_token_s",
    ):
        assert told[key] >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "found 0 arguments, wanted [MODEL] PROMPT"),
        (["run", "default"], "found the model default but no PROMPT"),
        (["run", ""], "found an empty PROMPT"),
        (["run", "m", "Why", "is"], "is the prompt in quotes?"),
        (["run", "--logprobs", "2", "m", "x"], "--logprobs needs --json"),
        (["run", "--raw", "--system", "s", "m", "x"], "--system needs the chat template"),
        (["run", "--bits", "9", "m", "x"], "9 is not in the range"),
        (["walk"], "No such command 'walk'"),
    ],
)
def test_wrong_usage_exits_with_2(run, fake_load, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_prompt_beyond_the_context_is_one_line_with_both_numbers(run, fake_load):
    fake_load.context = 8
    code, out, err = run("run", "--raw", "m", "123456789")
    assert (code, out) == (1, "")
    assert err == (
        "error: prompt: found 9 tokens, but the context is 8; use a context of 10 or more, or "
        "shorten the prompt by 1 tokens: nothing was truncated\n"
    )


def test_a_sampling_setting_out_of_range_is_one_line(run, fake_load):
    code, _, err = run("run", "m", "x", "--top-p", "2")
    assert code == 1
    assert err.startswith("error: sampling: top_p=2.0 found")
    assert len(err.splitlines()) == 1


def test_help_names_every_verb_and_version_shows_one(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(
        verb in out for verb in ("run", "chat", "convert", "info", "eval", "bench", "doctor")
    )
    assert run()[1] == out
