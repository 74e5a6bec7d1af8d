"""What a picture shows, as parameters: drawn by ``render_pil`` (PIL) and by ``render`` (torch) alike.

All lengths are in canvas px: the canvas has the picture's aspect ratio and the area of the processor's budget
(70 soft tokens of 48 x 48 px), so a canvas px is about one px of what the model sees. The processor then
squeezes the canvas a little to whole soft tokens; ``Canvas.stretch`` says by how much.
"""

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from gemcut.demo import lettering

BUDGET = 70  # soft tokens per picture
CELL = 48  # px per side of a soft token: 3 x 3 patches of 16 x 16
AREA = BUDGET * CELL * CELL
MAX_SHAPES = 8
PLACES = 9
MAX_LETTERS = 6
MAX_DIGITS = 4
MASK_CAPACITY = 24576  # px of the largest lettering mask, so that a batch has a fixed size

RGB = tuple[int, int, int]
COLORS: dict[str, RGB] = {
    "red": (214, 32, 32),
    "green": (24, 150, 40),
    "blue": (36, 60, 220),
    "yellow": (245, 225, 30),
    "purple": (140, 40, 170),
    "orange": (250, 135, 15),
    "black": (12, 12, 12),
    "white": (248, 248, 248),
}
COLOR_NAMES = list(COLORS)
BACKGROUNDS = ["gray", *COLOR_NAMES]
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
SYMBOLS = LETTERS + DIGITS
WORDS = [
    "STOP", "OPEN", "EXIT", "TAXI", "CAFE", "BANK", "PARK", "SALE", "HOTEL", "PIZZA", "BUS", "ZOO", "SHOP",
    "FIRE", "HELP", "MILK", "PUSH", "PULL", "GATE", "ROAD", "FOOD", "CITY", "CLUB", "GOLD", "POST", "ROOM",
    "TRAM", "WIFI", "LIVE", "DESK", "BOOK", "GAME", "NEWS", "GOAL", "RICE", "LAMP", "TREE", "COLD", "HOT",
    "TEA", "BAKERY", "MARKET", "SCHOOL", "STREET", "TICKET", "POLICE", "MUSEUM", "GARDEN", "BRIDGE", "CINEMA",
    "OFFICE", "DOCTOR", "COFFEE", "FRESH", "BREAD", "WATER", "LIGHT", "MUSIC", "RADIO", "TRAIN", "SLOW",
]  # fmt: skip

_GRID_PLACES = [
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
]
_LINE_PLACES = {"row": ["left", "center", "right"], "column": ["top", "center", "bottom"]}


def held_out(key: str) -> bool:
    """Whether an item (word, number, combination) is kept out of training: one in sixteen, by its CRC."""
    return zlib.crc32(key.encode()) % 16 == 0


def target_grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of soft tokens that Gemma 4's processor gives a picture at the demo's budget."""
    factor = math.sqrt(AREA / (height * width))
    rows, columns = math.floor(factor * height / CELL), math.floor(factor * width / CELL)
    if rows == 0:
        return 1, min(width // height, BUDGET)
    if columns == 0:
        return min(height // width, BUDGET), 1
    return rows, columns


@dataclass(frozen=True)
class Canvas:
    """The drawing area: width and height in canvas px, rows and columns of soft tokens."""

    width: float
    height: float
    rows: int
    columns: int

    @classmethod
    def of(cls, height: int, width: int) -> "Canvas":
        """The canvas of a picture of this many px."""
        factor = math.sqrt(AREA / (height * width))
        return cls(width * factor, height * factor, *target_grid(height, width))

    @property
    def stretch(self) -> tuple[float, float]:
        """Canvas px per px of the processed picture, in x and y."""
        return self.width / (self.columns * CELL), self.height / (self.rows * CELL)

    @property
    def layout(self) -> str:
        """ "grid": 3 x 3 places; "row" or "column": nine places in line, for long narrow pictures."""
        if self.columns >= 3.75 * self.rows:
            return "row"
        return "column" if self.rows >= 3.75 * self.columns else "grid"

    @property
    def stacked(self) -> bool:
        """Whether the picture is too narrow for six letters side by side."""
        return self.columns <= 3

    def place(self, index: int) -> tuple[float, float, float, float]:
        """Center (x, y), width and height of one of the nine places, in reading order."""
        across, down = {"grid": (3, 3), "row": (9, 1), "column": (1, 9)}[self.layout]
        width, height = self.width / across, self.height / down
        return (index % across + 0.5) * width, (index // across + 0.5) * height, width, height

    def place_name(self, index: int) -> str:
        """What the place is called: in a line its third of the picture."""
        return _GRID_PLACES[index] if self.layout == "grid" else _LINE_PLACES[self.layout][index // 3]

    def soft_token(self, x: float, y: float) -> int:
        """Index of the soft token over a canvas point."""
        stretch_x, stretch_y = self.stretch
        column = min(max(int(x / stretch_x) // CELL, 0), self.columns - 1)
        row = min(max(int(y / stretch_y) // CELL, 0), self.rows - 1)
        return row * self.columns + column


@dataclass(frozen=True)
class Look:
    """Background and surface of a picture."""

    background: str
    rgb: RGB
    slope_x: float  # change of the background's gray level from left to right
    slope_y: float
    noise: float  # standard deviation, 0..255
    blur: float  # canvas px


@dataclass(frozen=True)
class Shape:
    """One filled shape; ``place`` is the index of its place on the canvas."""

    kind: str
    color: str
    place: int
    rgb: RGB
    x: float
    y: float
    radius: float
    angle: float  # radians
    ring: float  # stroke of a ring as a fraction of the radius

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class ShapeScene:
    """One to eight shapes, in reading order."""

    canvas: Canvas
    look: Look
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class SignScene:
    """A sign with a word or a number; ``plate`` is its color, or None for bare letters on the background."""

    canvas: Canvas
    look: Look
    text: str
    style: lettering.Style
    em: float  # font size in canvas px
    plate: str | None
    plate_rgb: RGB
    ink_rgb: RGB
    x: float  # center of the plate
    y: float
    angle: float
    half_width: float
    half_height: float


Scene = ShapeScene | SignScene


def sample_size(rng: random.Random) -> tuple[int, int]:
    """Height and width in px of a picture: mostly ordinary, one in five up to 1:7, one in six up to 1:75."""
    limit = rng.choices([2.3, 7.0, 75.0], [65, 20, 15])[0]
    aspect = math.exp(rng.uniform(-1, 1) * math.log(limit))
    side = rng.uniform(260, 780)
    return max(44, round(side / math.sqrt(aspect))), max(44, round(side * math.sqrt(aspect)))


def _jitter(rng: random.Random, rgb: Sequence[float]) -> RGB:
    red, green, blue = (max(0, min(255, round(value) + rng.randint(-14, 14))) for value in rgb)
    return red, green, blue


def _luminance(rgb: Sequence[float]) -> float:
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def sample_look(rng: random.Random) -> Look:
    """Mostly gray backgrounds, some in the colors of the shapes; noise and blur of several strengths."""
    name = rng.choices(["gray", "white", "black", rng.choice(COLOR_NAMES)], [55, 17, 8, 20])[0]
    slope = 0.0
    if name == "gray":
        level = rng.uniform(95, 190)
        rgb, slope = _jitter(rng, (level, level, level)), 22.0
    else:
        rgb, slope = _jitter(rng, COLORS[name]), 6.0
    slopes = (rng.uniform(-slope, slope), rng.uniform(-slope, slope)) if rng.random() < 0.5 else (0.0, 0.0)
    blur = rng.uniform(0.3, 1.1) if rng.random() < 0.4 else 0.0
    return Look(name, rgb, *slopes, noise=rng.choice([0.0, 3.0, 6.0, 10.0]), blur=blur)


def _combination(canvas: Canvas, color: str, kind: str, place: int) -> str:
    return f"{color} {kind} {canvas.layout} {place}"


def sample_shapes(
    rng: random.Random, canvas: Canvas, most: int = MAX_SHAPES, unseen: bool = False
) -> ShapeScene:
    """A scene of one to ``most`` shapes.

    Combinations of color, shape and place that ``held_out`` names never appear, unless ``unseen``: then at
    least one does.
    """
    while True:
        look = sample_look(rng)
        number = rng.choices(range(1, most + 1), [22, 14, 13, 12, 11, 10, 9, 9][:most])[0]
        colors = [name for name in COLOR_NAMES if name != look.background]
        kinds = SHAPES
        if number > 2 and rng.random() < 0.35:  # few kinds make groups to count
            colors, kinds = rng.sample(colors, rng.randint(1, 3)), rng.sample(kinds, rng.randint(1, 3))
        shapes, known = [], True
        for place in sorted(rng.sample(range(PLACES), number)):
            x, y, width, height = canvas.place(place)
            radius = rng.uniform(0.32, 0.46) * min(width, height)
            kind, color = rng.choice(kinds), rng.choice(colors)
            if held_out(_combination(canvas, color, kind, place)):
                if not unseen:
                    while held_out(_combination(canvas, color, kind, place)):
                        kind, color = rng.choice(SHAPES), rng.choice(colors)
                else:
                    known = False
            shapes.append(
                Shape(
                    kind,
                    color,
                    place,
                    _jitter(rng, COLORS[color]),
                    x + rng.uniform(-0.8, 0.8) * (width / 2 - radius),
                    y + rng.uniform(-0.8, 0.8) * (height / 2 - radius),
                    radius,
                    math.radians(rng.uniform(-12, 12)),
                    rng.uniform(0.3, 0.4),
                )
            )
        if not (unseen and known):
            return ShapeScene(canvas, look, tuple(shapes))


def sample_text(rng: random.Random, unseen: bool = False) -> str:
    """A word of two to six letters (mostly random ones) or a number of one to four digits; ``unseen``: a
    held-out one.

    Words of only I and O are left out: on a sign they look like numbers.
    """
    while True:
        if rng.random() < 0.4:
            text = "".join(rng.choices(DIGITS, k=rng.choices([1, 2, 3, 4], [1, 3, 5, 7])[0]))
        elif rng.random() < 0.15:
            text = rng.choice(WORDS)
        else:
            text = "".join(rng.choices(LETTERS, k=rng.choices([2, 3, 4, 5, 6], [1, 2, 3, 4, 5])[0]))
        if (not set(text) <= set("IO")) and held_out(text) == unseen:
            return text


def _ink(rng: random.Random, plate: Sequence[float]) -> RGB:
    """A text color that stands out from the plate."""
    names = [name for name in COLOR_NAMES if abs(_luminance(COLORS[name]) - _luminance(plate)) > 85]
    strong = max(COLOR_NAMES, key=lambda name: abs(_luminance(COLORS[name]) - _luminance(plate)))
    return _jitter(rng, COLORS[strong if rng.random() < 0.5 or not names else rng.choice(names)])


def sample_sign(
    rng: random.Random,
    canvas: Canvas,
    fonts: Sequence[Sequence[str]],
    smallest: float = 34.0,
    unseen: bool = False,
    text: str | None = None,
    variety: float = 0.4,
) -> SignScene:
    """A scene with one sign.

    ``fonts``: files by family. ``smallest``: least font size in px after the processor (a letter of such a
    font is about two thirds as wide); long words in narrow pictures can be a little smaller. ``unseen``: a
    held-out text. ``variety``: how often letters are spaced, emboldened, stretched or slanted; training uses
    1.
    """
    look = sample_look(rng)
    text = text or sample_text(rng, unseen)
    style = lettering.Style(
        font=rng.choice(rng.choice(fonts)),
        spacing=rng.uniform(0, 0.15) if rng.random() < 0.45 * variety else 0.0,
        stacked=canvas.stacked,
        weight=rng.uniform(0, 0.05) if rng.random() < 0.3 * variety else 0.0,
        stretch=rng.uniform(0.82, 1.25) if rng.random() < 0.5 * variety else 1.0,
        slant=rng.uniform(-0.12, 0.28) if rng.random() < 0.35 * variety else 0.0,
    )
    width, height = lettering.measure(text, style)
    pad_x, pad_y = rng.uniform(0.15, 0.5), rng.uniform(0.14, 0.35)
    em = math.exp(rng.uniform(math.log(smallest), math.log(120))) * max(canvas.stretch)
    angle = math.radians(rng.uniform(-6, 6))
    # A long sign in a low picture cannot lean; what is left of the tilt takes a tenth of the other side.
    tall, wide = height + 2 * pad_y, width + 2 * pad_x
    em = min(em, 0.96 * canvas.width / wide, 0.96 * canvas.height / tall)
    tilt = min(0.1 * canvas.height / (em * wide), 0.1 * canvas.width / (em * tall))
    angle = max(-tilt, min(tilt, angle))
    cos, sin = math.cos(angle), abs(math.sin(angle))
    em = min(
        em, 0.98 * canvas.width / (wide * cos + tall * sin), 0.98 * canvas.height / (tall * cos + wide * sin)
    )
    half_width, half_height = em * wide / 2, em * tall / 2
    reach_x, reach_y = half_width * cos + half_height * sin, half_height * cos + half_width * sin
    plate: str | None = rng.choice([name for name in COLOR_NAMES if name != look.background])
    plate_rgb = _jitter(rng, COLORS[plate])
    if rng.random() < 0.15:
        plate, plate_rgb = None, look.rgb
    return SignScene(
        canvas, look, text, style, em, plate, plate_rgb, _ink(rng, plate_rgb),
        rng.uniform(reach_x, canvas.width - reach_x), rng.uniform(reach_y, canvas.height - reach_y), angle,
        half_width, half_height,
    )  # fmt: skip


def lettering_of(scene: SignScene, px_per_canvas: float) -> tuple[Image.Image, np.ndarray, float]:
    """The sign's lettering for a drawing scale: mask, letter centers (mask px from its middle), px per canvas
    px.
    """
    size = max(8, round(scene.em * px_per_canvas))
    mask, centers = lettering.draw(scene.text, scene.style, size)
    return mask, centers, size / scene.em


def marks(scene: Scene, centers: np.ndarray | None = None, scale: float = 1.0) -> list[tuple[int, int]]:
    """What is where, for the training's helper loss: (soft token, class) of every letter or shape, in reading
    order.

    Class 0 is "nothing", then the symbols, then the colored shapes. ``centers`` and ``scale`` are those of
    ``lettering_of`` and are needed for signs.
    """
    canvas = scene.canvas
    if isinstance(scene, ShapeScene):
        first = 1 + len(SYMBOLS)
        return [
            (
                canvas.soft_token(shape.x, shape.y),
                first + COLOR_NAMES.index(shape.color) * len(SHAPES) + SHAPES.index(shape.kind),
            )
            for shape in scene.shapes
        ]
    if centers is None:
        raise ValueError("the marks of a sign need its letter centers")
    cos, sin = math.cos(scene.angle), math.sin(scene.angle)
    found = []
    for letter, (x, y) in zip(scene.text, centers / scale, strict=True):
        token = canvas.soft_token(scene.x + x * cos - y * sin, scene.y + x * sin + y * cos)
        found.append((token, 1 + SYMBOLS.index(letter)))
    return found


MARK_CLASSES = 1 + len(SYMBOLS) + len(COLOR_NAMES) * len(SHAPES)
GROUP_CLASSES = MAX_SHAPES + 2


def groups(scene: ShapeScene) -> list[tuple[int, int, int]]:
    """How many shapes are like each one, for the training's helper loss: by name, by kind, by color.

    By name only the first of a group has its size; the later ones have the last class, "seen before".
    """
    names, kinds, colors = (
        [getattr(shape, field) for shape in scene.shapes] for field in ("name", "kind", "color")
    )
    return [
        (
            names.count(name) if name not in names[:index] else GROUP_CLASSES - 1,
            kinds.count(kinds[index]),
            colors.count(colors[index]),
        )
        for index, name in enumerate(names)
    ]
