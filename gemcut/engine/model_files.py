"""A checkpoint folder without its weights: plan, tokenizer, template variant, generation defaults.

Enters: a folder or hub id, later conversations. Leaves: prompts with their media. No torch: servers and
`gemcut render` read checkpoints through this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcut.data import SOFT_TOKEN_BUDGETS, ImagePatches, Prompt
from gemcut.errors import CheckpointError, InvalidRequest
from gemcut.hub import read_json, resolve
from gemcut.media.image import from_part, patches
from gemcut.plan import ModelPlan, parse_config
from gemcut.prompt.template import media_parts, render, starts_in_thought
from gemcut.prompt.tokenizer import MediaIds, Tokenizer
from gemcut.prompt.variant import carries_empty_thought, read_chat_template
from gemcut.prompt.writer import MediaPart
from gemcut.sampling import GenerationDefaults

LoadMedia = Callable[[Sequence[MediaPart], int], list[ImagePatches]]
RawPrompt = str | Sequence[int] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered conversation. `in_thought`: the reply goes on with a thought that the prompt opened;
    `may_think`: it may begin with one of its own."""

    prompt: Prompt
    media: tuple[ImagePatches, ...]
    in_thought: bool
    may_think: bool = False


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What a checkpoint says of itself. `image_tokens`: its default budget of a picture."""

    folder: Path
    plan: ModelPlan
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    empty_thought: bool
    image_tokens: int
    dtype: str | None

    @classmethod
    def open(
        cls, model: str | Path, *, revision: str | None = None, allow_unknown_config: bool = False
    ) -> ModelFiles:
        """Read a folder, or the files of a hub id (downloaded first, with the weights)."""
        folder = resolve(str(model), revision=revision)
        config = read_json(folder, "config.json")
        plan = parse_config(config, allow_unknown=allow_unknown_config)
        has_generation = (folder / "generation_config.json").is_file()
        generation = read_json(folder, "generation_config.json") if has_generation else None
        ids = plan.ids
        sees = plan.vision is not None or plan.patch_embedder is not None
        media = MediaIds(image=ids.image, boi=ids.boi, eoi=ids.eoi) if sees else MediaIds()
        has_ple = plan.text.per_layer_input is not None
        dtype = config.get("dtype") or config.get("torch_dtype")
        return cls(
            folder=folder,
            plan=plan,
            tokenizer=Tokenizer(folder, media),
            defaults=GenerationDefaults.parse(generation, plan.ids.eos),
            empty_thought=carries_empty_thought(read_chat_template(folder), has_ple),
            image_tokens=_processor_budget(folder) or plan.default_image_tokens,
            dtype=dtype if isinstance(dtype, str) else None,
        )

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = False,
        preserve_thinking: bool = False,
        add_generation_prompt: bool = True,
        image_tokens: int | None = None,
        load_media: LoadMedia | None = None,
    ) -> ChatPrompt:
        """Render a conversation and load its media.

        image_tokens: soft tokens that a picture may take, one of 70, 140, 280, 560, 1120.
        load_media: turns media parts into patches; by default here and now, local files allowed.
        Raises InvalidRequest with `param` set to the offending message part.
        """
        budget = self.image_tokens if image_tokens is None else image_tokens
        if budget not in SOFT_TOKEN_BUDGETS:
            budgets = ", ".join(map(str, SOFT_TOKEN_BUDGETS))
            raise InvalidRequest(
                f"A picture takes at most {budgets} tokens, not {budget!r}.", "max_soft_tokens"
            )
        segments = render(
            messages,
            tools=tools,
            enable_thinking=enable_thinking,
            preserve_thinking=preserve_thinking,
            add_generation_prompt=add_generation_prompt,
            empty_thought=self.empty_thought,
        )
        media = (load_media or load_pictures)(media_parts(messages), budget)
        for picture in media:
            self._check_grid(picture)
        prompt = self.tokenizer.encode(segments, [picture.soft_tokens for picture in media])
        return ChatPrompt(prompt, tuple(media), starts_in_thought(segments), enable_thinking)

    def _check_grid(self, picture: ImagePatches) -> None:
        vision = self.plan.vision
        longest = max(picture.rows, picture.columns)
        if vision is not None and longest > vision.positions:
            raise InvalidRequest(
                f"The picture's grid of {picture.columns} x {picture.rows} patches is longer than the "
                f"model's position table of {vision.positions}. Cut the picture, or give it fewer tokens."
            )


def chat_options(template: Mapping[str, Any] | None, processor: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keyword arguments of `ModelFiles.chat_prompt`; unknown keys are refused by name."""
    options: dict[str, Any] = {}
    for key, value in (template or {}).items():
        if key not in ("enable_thinking", "preserve_thinking"):
            raise InvalidRequest(f"chat_template_kwargs has no {key!r}.", f"chat_template_kwargs.{key}")
        if not isinstance(value, bool):
            raise InvalidRequest(
                f"{key} must be true or false, got {value!r}.", f"chat_template_kwargs.{key}"
            )
        options[key] = value
    for key, value in (processor or {}).items():
        if key != "max_soft_tokens":
            raise InvalidRequest(f"mm_processor_kwargs has no {key!r}.", f"mm_processor_kwargs.{key}")
        options["image_tokens"] = value
    return options


def raw_prompt(files: ModelFiles, prompt: RawPrompt) -> Prompt:
    """A prompt without a chat template: a text, token ids, or a mapping with either."""
    if isinstance(prompt, Mapping):
        known = [key for key in ("prompt", "prompt_token_ids") if key in prompt]
        if len(prompt) != 1 or not known:
            raise InvalidRequest(
                'A prompt mapping holds "prompt" or "prompt_token_ids", nothing else.', "prompt"
            )
        prompt = prompt[known[0]]
    if isinstance(prompt, str):
        return files.tokenizer.encode_raw(prompt)
    ids: tuple[int, ...] = tuple(prompt)  # type: ignore[assignment]
    vocab = files.plan.text.vocab
    # by whole columns: a loop over the ids of a long prompt takes milliseconds
    if ids and (set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= vocab):
        wrong = next(token for token in ids if type(token) is not int or not 0 <= token < vocab)
        raise InvalidRequest(f"The prompt holds {wrong!r}; token ids are 0 to {vocab - 1}.", "prompt")
    return Prompt(ids)


def load_pictures(parts: Sequence[MediaPart], budget: int) -> list[ImagePatches]:
    """Open and cut the pictures of a conversation, in order."""
    media = []
    for part in parts:
        if part.kind != "image":
            raise InvalidRequest(f"gemcut takes no {part.kind} yet; it takes text and pictures.", part.param)
        try:
            media.append(patches(from_part(part.part), budget))
        except InvalidRequest as error:
            error.param = part.param
            raise
    return media


def _processor_budget(folder: Path) -> int | None:
    """max_soft_tokens of the checkpoint's image processor files, None without one."""
    for name, path in (("processor_config.json", ("image_processor",)), ("preprocessor_config.json", ())):
        if not (folder / name).is_file():
            continue
        values: Any = read_json(folder, name)
        for key in path:
            values = values.get(key) or {}
        budget = values.get("max_soft_tokens") if isinstance(values, dict) else None
        if budget is not None:
            if budget not in SOFT_TOKEN_BUDGETS:
                raise CheckpointError(f"{folder / name}: max_soft_tokens cannot be {budget!r}.")
            return budget
    return None
