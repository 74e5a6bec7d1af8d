"""`gemcut chat`: turns and mistakes through a pipe; prefix cache and Ctrl-D on a terminal; an interrupt."""

from __future__ import annotations

import signal
import subprocess
import sys

from cli_rig import QUESTION, SAID, SIGN, call, on_terminal, refused


def test_turns_through_a_pipe() -> None:
    result = call("chat", stdin=f"/image {SIGN}\n{QUESTION}\n\n/image '{SIGN}'\n{QUESTION}\n")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(SAID)
    assert result.out.count("\n") == 2


def test_a_reset_forgets() -> None:
    turn = f"/image {SIGN}\n{QUESTION}\n"
    result = call("chat", stdin=f"{turn}/reset\n{turn}/system Be brief.\n/system\n{turn}/quit\nnever read\n")
    assert (result.code, result.out, result.err) == (0, SAID * 3, "")


def test_mistakes_are_told_and_the_conversation_goes_on() -> None:
    result = call(
        "chat", stdin=f"/imagine x\n/image\n/image nowhere.png\n/image /\n/image {SIGN}\n{QUESTION}\n/help\n"
    )
    assert result.code == 1  # a script must know
    assert result.out == SAID
    told = result.err.splitlines()
    assert told[0] == "gemcut: There is no command /imagine. Did you mean /image?"
    assert told[1] == "gemcut: Which picture? /image FILE"
    assert told[2] == "gemcut: There is no picture file 'nowhere.png'."
    assert told[3] == "gemcut: / is a directory; name a picture file."
    assert told[4].startswith("/image FILE")


def test_a_file_that_is_no_picture_is_not_tried_again(tmp_path: object) -> None:
    file = f"{tmp_path}/a.png"
    with open(file, "w") as out:
        out.write("text")
    result = call("chat", stdin=f"/image {file}\nWhat?\n/image {SIGN}\n{QUESTION}\n")
    assert (result.code, result.out) == (1, SAID)
    assert result.err.startswith(f"gemcut: {file}: ")
    assert result.err.count("\n") == 1


def test_too_long_a_conversation() -> None:
    result = call("chat", "--max-model-len", "100", stdin=f"/image {SIGN}\n{QUESTION}\n{'word ' * 40}\n")
    assert result.code == 1
    assert result.out == SAID
    assert "/reset begins a new conversation" in result.err


def test_a_slash_can_be_said() -> None:
    result = call("chat", "--max-tokens", "1", stdin="//etc is a folder\n")
    assert (result.code, result.err) == (0, "")


def test_flags_are_checked_first() -> None:
    refused(2, "chat", "--temperature", "-1", says="--temperature must be")
    refused(1, "chat", "--model", "nowhere", says="There is no folder")
    refused(2, "chat", "hi", says="hi")


def test_on_a_terminal() -> None:
    typed = [
        ("> ", f"/image {SIGN}\n"),
        ("> ", f"{QUESTION}\n"),
        ("first after", "What color is the sign?\n"),
        ("first after", f"{QUESTION}\n"),
        (" cached)", "/quit\n"),  # pages of the turns before, none of which ends inside the picture
    ]
    code, shown = on_terminal(["chat"], typed)
    assert code == 0
    assert SAID in shown
    assert "Traceback" not in shown


def test_ctrl_d_ends() -> None:
    assert on_terminal(["chat"], [("> ", "\x04")])[0] == 0


def test_an_interrupt_leaves_without_a_traceback() -> None:
    command = [sys.executable, "-m", "gemcut.cli", "chat", "--device", "cpu"]
    pipe = subprocess.PIPE

    def as_from_a_terminal() -> None:  # a shell's background jobs inherit that interrupts are ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        bufsize=1,
        preexec_fn=as_from_a_terminal,
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write("What is 2 + 3?\n")
        assert chat.stdout.readline()  # it is past loading, and waits for the next line
        chat.send_signal(signal.SIGINT)
        _, errors = chat.communicate(timeout=60)
    assert chat.returncode == 130
    assert "Traceback" not in errors
