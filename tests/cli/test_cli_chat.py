import pytest
from click.testing import CliRunner

from elute.cli.application import application


@pytest.fixture
def chat(fake_load):
    def call(lines, *arguments):
        return CliRunner().invoke(application, ["chat", *arguments], input=lines)

    return call


def test_chat_answers_every_line_and_leaves_at_the_end(chat, fake_load):
    done = chat("who?\nand?\n")
    assert done.exit_code == 0
    assert done.stdout == "hello there\nhello there\n"
    assert "reused" in done.stderr.splitlines()[-1]


def test_chat_keeps_the_conversation_until_reset(chat, fake_load):
    chat("who?\nand?\n")
    assert bytes(t for t in fake_load.executor.cache if t < 256).startswith(
        b"<user>who?<assistant>hello there<user>and?"
    )
    chat("who?\n/reset\nand?\n")
    assert bytes(fake_load.executor.cache[:10]) == b"<user>and?"


def test_chat_commands_are_not_sent_to_the_model(chat, fake_load):
    done = chat("/help\n/nonsense\n\n/exit\nnever\n")
    assert done.stdout == ""
    assert "no command /nonsense" in done.stderr
    assert fake_load.executor.calls == []


def test_chat_that_is_full_says_so_and_goes_on(chat, fake_load):
    fake_load.context = 60
    done = chat("who?\n" + "x" * 80 + "\nand?\n")
    assert done.stdout == "hello there\nhello\n"
    assert "error: prompt: found" in done.stderr
    assert "/reset starts over" in done.stderr


def test_chat_without_a_template_is_refused(chat, fake_load):
    fake_load.template = False
    done = chat("who?\n")
    assert "no chat template" in str(done.exception)


def test_chat_over_a_pipe_exits_with_1_after_an_error(elute_process):
    process = elute_process("chat")
    out, err = process.communicate("x" * 4001 + "\n", timeout=10)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("error: prompt: found")
