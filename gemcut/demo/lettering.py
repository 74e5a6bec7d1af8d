"""Letters as masks, drawn with PIL one by one: measured first, so that a sign can be fitted, then drawn."""

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_REFERENCE = 64  # font size (px) at which extents are measured
_MARGIN = 2  # empty pixels around a mask, so that interpolation at its border fades out


@dataclass(frozen=True)
class Style:
    """How the letters look, all lengths in em (the font size)."""

    font: str
    spacing: float = 0.0  # extra space between letters
    stacked: bool = False  # one letter under the other, for tall narrow pictures
    weight: float = 0.0  # extra stroke width
    stretch: float = 1.0  # horizontal scale of the letters
    slant: float = 0.0  # horizontal shift per unit of height, positive leans right


@functools.lru_cache(maxsize=4096)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@functools.lru_cache(maxsize=65536)
def _letter(path: str, size: int, letter: str) -> tuple[float, float, float, float, float]:
    """Advance and box (left, top, right, bottom; baseline origin) of one letter in px."""
    font = _font(path, size)
    return font.getlength(letter), *font.getbbox(letter, anchor="ls")


def _place(
    text: str, style: Style, size: int
) -> tuple[list[tuple[float, float]], tuple[float, float, float, float]]:
    """Baseline origin of every letter and the box around all of them, in px at this font size."""
    origins, boxes, x = [], [], 0.0
    for index, letter in enumerate(text):
        advance, left, top, right, bottom = _letter(style.font, size, letter)
        origin = (-(left + right) / 2, index * size * (0.92 + style.spacing)) if style.stacked else (x, 0.0)
        origins.append(origin)
        boxes.append((left + origin[0], top + origin[1], right + origin[0], bottom + origin[1]))
        x += advance + style.spacing * size
    stroke = round(style.weight * size)
    left, top = min(box[0] for box in boxes) - stroke, min(box[1] for box in boxes) - stroke
    right, bottom = max(box[2] for box in boxes) + stroke, max(box[3] for box in boxes) + stroke
    return origins, (left, top, right, bottom)


def measure(text: str, style: Style) -> tuple[float, float]:
    """Width and height of the lettering in em."""
    left, top, right, bottom = _place(text, style, _REFERENCE)[1]
    width, height = (right - left) / _REFERENCE, (bottom - top) / _REFERENCE
    return width * style.stretch + abs(style.slant) * height, height


def draw(text: str, style: Style, size: int) -> tuple[Image.Image, np.ndarray]:
    """Draw the lettering at a font size in px.

    Returns the mask (mode L, 255 is ink, with a small margin) and the centers of the letters, [letters, 2] as
    (x, y) in px from the middle of the mask.
    """
    origins, (left, top, right, bottom) = _place(text, style, size)
    width, height = math.ceil(right - left) + 2 * _MARGIN, math.ceil(bottom - top) + 2 * _MARGIN
    mask = Image.new("L", (width, height), 0)
    pen, font, stroke = ImageDraw.Draw(mask), _font(style.font, size), round(style.weight * size)
    centers = []
    for letter, (x, y) in zip(text, origins, strict=True):
        x, y = x - left + _MARGIN, y - top + _MARGIN
        pen.text((x, y), letter, font=font, fill=255, anchor="ls", stroke_width=stroke)
        _, letter_left, letter_top, letter_right, letter_bottom = _letter(style.font, size, letter)
        centers.append((x + (letter_left + letter_right) / 2, y + (letter_top + letter_bottom) / 2))
    middle = np.array([(width / 2, height / 2)])
    offsets = np.array(centers) - middle
    if style.stretch != 1.0 or style.slant != 0.0:
        new_width = math.ceil(width * style.stretch + abs(style.slant) * height)
        # PIL wants the inverse map, from the new mask to the old: x = (x' - slant * (middle - y)) / stretch
        back = 1 / style.stretch
        shift = style.slant * back
        offset = width / 2 - back * new_width / 2 - shift * height / 2
        mask = mask.transform(
            (new_width, height),
            Image.Transform.AFFINE,
            (back, shift, offset, 0, 1, 0),
            Image.Resampling.BILINEAR,
        )
        offsets = np.stack(
            [offsets[:, 0] * style.stretch - style.slant * offsets[:, 1], offsets[:, 1]], axis=1
        )
    return mask, offsets
