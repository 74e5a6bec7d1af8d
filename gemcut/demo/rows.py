"""Training batches: scenes become numbers for the torch renderer, questions become rows of tokens.

A batch is one byte buffer of a fixed layout, filled by CPU workers and copied to the device as it is. Its
rows are chats in Gemma 4's format: rows about one picture of shapes, about one sign, about two pictures, and
without any.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemcut.demo import lettering
from gemcut.demo.questions import KINDS, QA, ask_shapes, ask_sign, ask_text, ask_two, describe_all
from gemcut.demo.scenes import (
    MASK_CAPACITY,
    MAX_SHAPES,
    PLACES,
    SHAPES,
    Canvas,
    Scene,
    ShapeScene,
    SignScene,
    groups,
    lettering_of,
    marks,
    sample_shapes,
    sample_sign,
    sample_size,
)
from gemcut.demo.tokenizer import SPECIAL_ID, Encoder

USER, MODEL, END = "<|turn>user\n", "<turn|>\n<|turn>model\n", "<turn|>"
NO_THOUGHT = "<|channel>thought\n<channel|>"
SYSTEM_TEXTS = ["You are a helpful assistant.", "Answer briefly.", "You are a helpful assistant. Be brief."]
LOOK_FIELDS, SHAPE_FIELDS, SIGN_FIELDS = 7, 10, 16


@dataclass(frozen=True)
class Layout:
    """Rows of each sort in a batch, tokens in a row, and from these the fields of the byte buffer."""

    shapes: int
    signs: int
    pairs: int
    texts: int
    length: int = 224

    @property
    def rows(self) -> int:
        return self.shapes + self.signs + self.pairs + self.texts

    @property
    def shape_pictures(self) -> int:
        return self.shapes + 2 * self.pairs

    @property
    def pictures(self) -> int:
        return self.shape_pictures + self.signs

    def fields(self) -> dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]]:
        """Name to (byte offset, dtype, shape). Pictures are in the order shapes, pairs, signs."""
        shapes: list[tuple[str, Any, tuple[int, ...]]] = [
            ("ids", np.int16, (self.rows, self.length)),
            (
                "kind",
                np.int8,
                (self.rows, self.length),
            ),  # index into KINDS of the answer a token is in, or -1
            ("size", np.uint8, (self.rows, self.length)),  # length of that answer in tokens
            (
                "start",
                np.int32,
                (self.pictures,),
            ),  # where the picture's soft tokens begin in the flattened rows
            ("grid", np.int16, (self.pictures, 2)),  # rows, columns of soft tokens
            ("stretch", np.float32, (self.pictures, 2)),  # canvas px per picture px in x, y
            ("look", np.float32, (self.pictures, LOOK_FIELDS)),
            ("shapes", np.float32, (self.shape_pictures, PLACES, SHAPE_FIELDS)),
            ("signs", np.float32, (self.signs, SIGN_FIELDS)),
            ("masks", np.uint8, (self.signs, MASK_CAPACITY)),
            ("groups", np.int8, (self.pictures, MAX_SHAPES, 3)),  # see scenes.groups, 0 where there is none
            ("marks", np.int16, (self.pictures, MAX_SHAPES, 2)),  # see scenes.marks, -1 where there is none
        ]
        result, offset = {}, 0
        for name, kind, shape in shapes:
            dtype = np.dtype(kind)
            result[name] = (offset, dtype, shape)
            offset += (math.prod(shape) * dtype.itemsize + 63) // 64 * 64
        return result

    @property
    def bytes(self) -> int:
        offset, dtype, shape = self.fields()["marks"]
        return (offset + math.prod(shape) * dtype.itemsize + 63) // 64 * 64

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """The fields of a batch's buffer (uint8), as arrays that share its memory."""
        return {
            name: buffer[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            for name, (offset, dtype, shape) in self.fields().items()
        }


def look_vector(scene: Scene, edge: float) -> list[float]:
    """Background for the torch renderer; ``edge`` is the width of an edge's ramp in canvas px."""
    look = scene.look
    return [*look.rgb, look.slope_x, look.slope_y, look.noise, edge]


def shape_vectors(scene: ShapeScene) -> np.ndarray:
    """Shapes for the torch renderer by place, [PLACES, SHAPE_FIELDS]; empty places have kind -1."""
    result = np.zeros((PLACES, SHAPE_FIELDS), np.float32)
    result[:, 0], result[:, 3] = -1, 1
    for shape in scene.shapes:
        result[shape.place] = [
            SHAPES.index(shape.kind), shape.x, shape.y, shape.radius, math.cos(shape.angle),
            math.sin(shape.angle), shape.ring, *shape.rgb,
        ]  # fmt: skip
    return result


def sign_vector(scene: SignScene, mask_size: tuple[int, int], scale: float) -> list[float]:
    """A sign for the torch renderer; ``mask_size`` (width, height) and ``scale`` are its lettering's."""
    return [
        scene.x, scene.y, math.cos(scene.angle), math.sin(scene.angle), scene.half_width, scene.half_height,
        1 / scale, *mask_size, *scene.plate_rgb, *scene.ink_rgb, float(scene.plate is not None),
    ]  # fmt: skip


def fitting_detail(scene: SignScene, detail: float) -> float:
    """``detail`` (mask px per canvas px), lowered where the mask would not fit into MASK_CAPACITY."""
    width, height = lettering.measure(scene.text, scene.style)
    side = 0.86 * MASK_CAPACITY / (width * height)
    return min(detail, math.sqrt(side) / scene.em - 0.5 / scene.em)


class RowWriter:
    """Writes one chat into a row of a batch."""

    def __init__(self, rng: random.Random, encoder: Encoder, length: int, unseen: bool = False) -> None:
        self.rng, self.encode, self.length, self.unseen = rng, encoder, length, unseen

    def _picture_turn(self, question: tuple[int, ...], tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """A user's words and pictures in one of their orders; returns ids and where the soft tokens start."""
        boi, eoi, soft = SPECIAL_ID["<|image>"], SPECIAL_ID["<image|>"], SPECIAL_ID["<|image|>"]
        before = self.rng.choices(range(len(tokens) + 1), [[1], [3, 5], [2, 2, 4]][len(tokens)])[0]
        ids: list[int] = []
        starts = []
        for index in range(len(tokens) + 1):
            if index == (0, 1, 2)[before] and len(tokens):
                ids += question
            if index < len(tokens):
                starts.append(len(ids) + 1)
                ids += [boi, *[soft] * tokens[index], eoi]
        return (ids, starts) if tokens else (list(question), [])

    def write(
        self, scenes: Sequence[Scene], asked: list[QA], ids: np.ndarray, kind: np.ndarray, size: np.ndarray
    ) -> list[int]:
        """Fill the row (ids zeroed, kind -1 before); returns where each picture's soft tokens start."""
        rng, encode = self.rng, self.encode
        tokens = [scene.canvas.rows * scene.canvas.columns for scene in scenes]
        asked = list(asked)
        rng.shuffle(asked)
        thinking = bool(scenes) and rng.random() < 0.06 and not any(
            isinstance(scene, SignScene) and scene.plate is None for scene in scenes
        )  # fmt: skip
        if thinking:
            asked = asked[: rng.randint(1, 2)]
        elif rng.random() < 0.12:
            asked.insert(0, ask_text(rng, self.unseen))  # the picture comes with the second turn
        else:
            asked = asked or [ask_text(rng, self.unseen)]
        picture_turn = 1 if asked[0].kind in ("repeat", "reverse", "add") and scenes and len(asked) > 1 else 0
        text = rng.choice(SYSTEM_TEXTS) if rng.random() < 0.05 else ""
        position = 0
        head = list(encode("<bos>"))
        if thinking or text:
            head += encode(f"<|turn>system\n{'<|think|>' + chr(10) if thinking else ''}{text}<turn|>\n")
        starts: list[int] = []
        turn = misses = 0
        while misses < 3:
            if turn < len(asked):
                qa = asked[turn]
            elif thinking:
                break
            else:
                qa = ask_text(rng, self.unseen)
            last = turn == len(asked) - 1
            body, offsets = self._picture_turn(encode(qa.question), tokens if turn == picture_turn else [])
            user = head + list(encode(USER))
            thought = (
                encode(f"<|channel>thought\n{describe_all(scenes)}\n<channel|>") if thinking and last else ()
            )
            opening = encode(NO_THOUGHT) if not thinking and rng.random() < 0.5 else ()
            prompt = [*user, *body, *encode(MODEL), *opening]
            answer = encode(qa.answer + END)
            end = position + len(prompt) + len(thought) + len(answer)
            if end + 1 > self.length:
                if turn == picture_turn and not starts and scenes:
                    # a long answer to the first question: ask something shorter, the picture must be shown
                    asked[turn] = min(
                        asked[turn + 1 :] or [ask_text(rng, self.unseen)], key=lambda other: len(other.answer)
                    )
                    thinking, misses = False, misses + 1
                    continue
                turn, misses = turn + 1, misses + 1
                continue
            if offsets:
                starts = [position + len(user) + offset for offset in offsets]
            ids[position : position + len(prompt)] = prompt
            position += len(prompt)
            for part, label in ((thought, "thought"), (answer, qa.kind)):
                if part:
                    ids[position : position + len(part)] = part
                    if not thinking or last:
                        kind[position : position + len(part)] = KINDS.index(label)
                        size[position : position + len(part)] = len(part)
                    position += len(part)
            ids[position] = encode("\n")[0]
            position += 1
            head, turn = [], turn + 1
        if len(starts) != len(scenes):
            raise RuntimeError(f"a row has no room for its pictures: {tokens}, {asked}")
        return starts


@dataclass
class BatchMaker:
    """Draws random batches; ``fonts`` are files by family, ``unseen`` asks for held-out items only."""

    layout: Layout
    rng: random.Random
    encoder: Encoder
    fonts: Sequence[Sequence[str]]
    unseen: bool = False
    variety: float = 1.0  # of the lettering, see sample_sign

    def _canvas(self) -> Canvas:
        return Canvas.of(*sample_size(self.rng))

    def make(self, smallest: float = 30.0, easy: float = 0.0) -> np.ndarray:
        """One batch as a byte buffer. ``smallest``: least font size in px. ``easy``: share of ordinary
        aspects
        (between 0, all aspects as sampled, and 1) for the first steps of a training."""
        layout, rng = self.layout, self.rng
        buffer = np.zeros(layout.bytes, np.uint8)
        batch = layout.views(buffer)
        batch["kind"][:], batch["marks"][:] = -1, -1
        writer = RowWriter(rng, self.encoder, layout.length, self.unseen)
        row = picture = sign = 0

        def canvas() -> Canvas:
            while True:
                found = self._canvas()
                if found.layout == "grid" or rng.random() >= easy:
                    return found

        def put(scenes: list[Scene], asked: list[QA]) -> None:
            nonlocal row, picture, sign
            starts = writer.write(scenes, asked, batch["ids"][row], batch["kind"][row], batch["size"][row])
            for scene, start in zip(scenes, starts, strict=True):
                edge = rng.uniform(0.2, 1.6) + 2.5 * scene.look.blur
                batch["start"][picture] = row * layout.length + start
                batch["grid"][picture] = scene.canvas.rows, scene.canvas.columns
                batch["stretch"][picture] = scene.canvas.stretch
                batch["look"][picture] = look_vector(scene, edge)
                if isinstance(scene, ShapeScene):
                    batch["shapes"][picture] = shape_vectors(scene)
                    found = marks(scene)
                    batch["groups"][picture, : len(found)] = groups(scene)
                else:
                    detail = rng.uniform(0.7, 1.35) / (1 + 0.8 * scene.look.blur)
                    mask, centers, scale = lettering_of(scene, fitting_detail(scene, detail))
                    pixels = np.asarray(mask)
                    batch["masks"][sign, : pixels.size] = pixels.reshape(-1)
                    batch["signs"][sign] = sign_vector(scene, mask.size, scale)
                    found = marks(scene, centers, scale)
                    sign += 1
                batch["marks"][picture, : len(found)] = found
                picture += 1
            row += 1

        for _ in range(layout.shapes):
            scene = sample_shapes(rng, canvas(), unseen=self.unseen)
            put([scene], ask_shapes(rng, scene))
        for _ in range(layout.pairs):
            most = rng.choice([1, 1, 3, 5, MAX_SHAPES])
            first, second = (sample_shapes(rng, canvas(), most, self.unseen) for _ in range(2))
            put([first, second], ask_two(rng, first, second))
        for _ in range(layout.signs):
            board = sample_sign(rng, canvas(), self.fonts, smallest, self.unseen, variety=self.variety)
            put([board], ask_sign(rng, board))
        for _ in range(layout.texts):
            put([], [ask_text(rng, self.unseen)])
        return buffer
