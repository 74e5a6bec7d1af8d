"""Which of the two official templates a checkpoint carries.

Enters: the checkpoint's template text. Leaves: one bool. They differ in one place (spec 6.3): with
thinking off, the 12B, 26B-A4B and 31B put an empty thought behind the generation prompt.

The template is rendered once, in Jinja's sandbox, in a child process with limits on time and memory:
the sandbox keeps a template from reaching Python's objects, not from looping. The child runs this file
as a script.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

EMPTY_THOUGHT = "<|channel>thought\n<channel|>"
MAX_TEMPLATE_BYTES = 1 << 20  # the official ones have 19 kB
MAX_PROMPT_CHARACTERS = 1 << 16
TIMEOUT_S = 10.0
MEMORY_BYTES = 1 << 30

log = logging.getLogger(__name__)


def carries_empty_thought(chat_template: str | None, has_per_layer_embeddings: bool) -> bool:
    """Whether generation prompts without thinking end in an empty thought.

    Read off the template. Without one, or with one that cannot be rendered (logged as a warning), by
    the rule: models with per-layer embeddings (E2B, E4B) do not carry it, the others do.
    """
    rule = not has_per_layer_embeddings
    if chat_template is None:
        return rule
    prompt, reason = render_once(chat_template)
    if prompt is None:
        log.warning(
            "The checkpoint's chat template cannot be rendered (%s). Assuming %s empty thought, by its kind.",
            reason,
            "an" if rule else "no",
        )
        return rule
    return prompt.endswith(EMPTY_THOUGHT)


def render_once(chat_template: str, timeout_s: float = TIMEOUT_S) -> tuple[str | None, str]:
    """The generation prompt for one user turn, or None and the reason why there is none."""
    source = chat_template.encode(errors="replace")
    if len(source) > MAX_TEMPLATE_BYTES:
        return None, f"it has {len(source)} bytes, the limit is {MAX_TEMPLATE_BYTES}"
    try:
        child = subprocess.run(
            [sys.executable or "python3", "-P", __file__],
            input=source,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"it ran for more than {timeout_s:g} s"
    except OSError as error:
        return None, f"no child process could be started: {error}"
    if child.returncode:
        lines = child.stderr.decode(errors="replace").strip().splitlines()
        return None, lines[-1][:200] if lines else f"the child process ended with {child.returncode}"
    return child.stdout.decode(errors="replace"), ""


def read_chat_template(folder: str | Path) -> str | None:
    """The template text of a checkpoint folder, None if it has none.

    `chat_template.jinja`, or else `chat_template` in tokenizer_config.json: a string, or a list of named
    templates of which `default` counts.
    """
    folder = Path(folder)
    with contextlib.suppress(FileNotFoundError):
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s is not valid JSON (%s), so no chat template is read from it.", folder, error)
        return None
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _render(source: str) -> str:
    """In the child: render, and keep the end of the prompt, which is what matters."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    # as transformers sets it up
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    values: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": None,
        "add_generation_prompt": True,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "raise_exception": raise_exception,
        "strftime_now": lambda layout: "",
    }
    return environment.from_string(source).render(values)[-MAX_PROMPT_CHARACTERS:]


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # not every platform has it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def _main() -> None:
    _limit_memory()
    try:
        prompt = _render(sys.stdin.buffer.read().decode(errors="replace"))
    except Exception as error:  # whatever the template did is the answer
        sys.exit(f"{type(error).__name__}: {error}")
    sys.stdout.buffer.write(prompt.encode(errors="replace"))


if __name__ == "__main__":
    _main()
