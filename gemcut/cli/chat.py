"""`gemcut chat`: a conversation in the terminal, or through a pipe with one message a line."""

from __future__ import annotations

import difflib
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gemcut.cli import options, terminal
from gemcut.errors import GemcutError, InvalidRequest

if TYPE_CHECKING:
    from gemcut.llm import LLM
    from gemcut.sampling import SamplingParams

HELP = """\
/image FILE    attach a picture to the next message
/system TEXT   set the instructions, and begin anew
/reset         forget the conversation
/help          this list
/quit          end (so does the end of the input)
A message that begins with / is written with two: //etc is a path.
"""
COMMANDS = ("/image", "/system", "/reset", "/help", "/quit")


def chat(
    image_tokens: options.ImageTokens = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    think: options.Think = False,
    system: options.System = None,
    model: options.Model = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    kernels: options.Kernels = "auto",
    numerics: options.Numerics = "auto",
    graphs: options.Graphs = "auto",
    max_model_len: options.MaxModelLen = None,
    kv_bytes: options.KVBytes = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    allow_unknown_config: options.AllowUnknownConfig = False,
    verbose: options.Verbose = False,
) -> None:
    """Talk with a model. /help lists what can be done in a conversation.

    Each turn computes only what is new: the turns before it are in the prefix cache. In a pipe every line of
    stdin is a message or a / command, every answer goes to stdout, and the exit code is 1 if a line failed.
    """
    settings = options.engine_settings(
        model=model,
        revision=revision,
        device=device,
        dtype=dtype,
        kernels=kernels,
        numerics=numerics,
        graphs=graphs,
        max_model_len=max_model_len,
        kv_bytes=kv_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
        allow_unknown_config=allow_unknown_config,
    )
    if verbose:
        terminal.log_details()
    from gemcut.cli import answer
    from gemcut.sampling import SamplingParams

    with options.usage():
        params = SamplingParams(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, max_tokens=max_tokens, seed=seed
        )
    files = answer.open_files(settings)
    llm = answer.start(settings, files)
    talk = _Talk(llm, params, think=think, image_tokens=int(image_tokens) if image_tokens else None)
    talk.begin(system)
    if not _converse(talk):
        raise typer.Exit(1)


def _converse(talk: _Talk) -> bool:
    """Take lines until they end. Whether all went well; on a terminal a person has seen what did not."""
    by_hand = terminal.is_terminal(sys.stdin)
    if by_hand:
        _edit_lines()
        terminal.write_dim("/help lists the commands, Ctrl-D ends.\n")
    fine = True
    while (line := _next_line(by_hand)) is not None:
        if not line.strip():
            continue
        try:
            if not talk.take(line.strip()):
                break
        except GemcutError as error:
            terminal.complain(str(error))
            fine = by_hand
        except KeyboardInterrupt:
            if not by_hand:
                raise
            terminal.write("\n")  # the answer is given up, the conversation goes on
    return fine


def _next_line(by_hand: bool) -> str | None:
    if not by_hand:
        try:
            return sys.stdin.readline() or None
        except UnicodeDecodeError as error:
            raise GemcutError(f"The input is not {sys.stdin.encoding} text: {error.reason}.") from error
    try:
        return input("> ")
    except EOFError:
        terminal.write("\n")
        return None


def _edit_lines() -> None:
    """Arrow keys and history, where Python was built with readline."""
    with suppress(ImportError):
        import readline  # noqa: F401  (input() uses it once it is imported)


class _Talk:
    """One conversation: its messages, and the pictures that wait for the next one."""

    def __init__(self, llm: LLM, params: SamplingParams, *, think: bool, image_tokens: int | None) -> None:
        self._llm, self._params = llm, params
        self._think, self._image_tokens = think, image_tokens
        self._system: str | None = None
        self._messages: list[dict[str, Any]] = []
        self._pictures: list[str] = []

    def begin(self, system: str | None) -> None:
        """Forget what was said; `system` are the instructions from now on."""
        self._system = system
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        self._pictures = []

    def take(self, line: str) -> bool:
        """A message or a command. False ends the conversation. Raises GemcutError for what cannot be done."""
        if line.startswith("//"):
            self._say(line[1:])
            return True
        if not line.startswith("/"):
            self._say(line)
            return True
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command == "/image":
            self._attach(rest)
        elif command == "/system":
            self.begin(rest or None)
        elif command == "/reset":
            self.begin(self._system)
        elif command == "/help":
            terminal.write_dim(HELP)
        elif command == "/quit":
            return False
        else:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            remedy = f"Did you mean {near[0]}?" if near else "/help lists them."
            raise InvalidRequest(f"There is no command {command}. {remedy}")
        return True

    def _attach(self, name: str) -> None:
        from gemcut.cli.run import check_picture

        if not name:
            raise InvalidRequest("Which picture? /image FILE")
        if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"":  # as a terminal pastes a dragged file
            name = name[1:-1]
        with suppress(RuntimeError):  # no such user
            name = str(Path(name).expanduser())
        check_picture(name)
        self._pictures.append(name)

    def _say(self, text: str) -> None:
        from gemcut.cli import answer
        from gemcut.cli.run import user_message

        at = f"messages[{len(self._messages)}]"
        pictures, self._pictures = self._pictures, []  # a picture that is none is not tried again
        messages = [*self._messages, user_message(pictures, text)]
        with answer.naming_pictures({f"{at}.content[{i}]": name for i, name in enumerate(pictures)}):
            prompt = self._llm.files.chat_prompt(
                messages, enable_thinking=self._think, image_tokens=self._image_tokens
            )
        try:
            output = answer.stream(self._llm, prompt, self._params)
        except InvalidRequest as error:
            if len(self._messages) > 1:
                raise InvalidRequest(f"{error} /reset begins a new conversation.", error.param) from error
            raise
        self._messages = [*messages, {"role": "assistant", "content": output.outputs[0].text}]
        answer.closing_line(output, self._llm.used, asked_tokens=self._params.max_tokens)
