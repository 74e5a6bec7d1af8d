"""Scenes drawn with torch, on the device that trains: thousands of pictures a second, straight into patches.

Every picture takes PATCHES patches of 16 x 16 px in the order of its soft tokens, nine for each, so that the
vision tower's pooling is a mean over nine neighbors; patches beyond the picture's grid are filled with
anything.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gemcut.demo.scenes import BUDGET

PATCHES = 9 * BUDGET
PATCH = 16
_STAR_STEP = 6.2831853 / 5


class Positions(NamedTuple):
    """Patch columns and rows, int64 [pictures, PATCHES]; whether a patch is inside the grid, bool, same
    shape.
    """

    x: Tensor
    y: Tensor
    valid: Tensor


def patch_positions(grid: Tensor) -> Positions:
    """Where the patches of pictures lie; ``grid`` [pictures, 2] holds rows and columns of soft tokens."""
    index = torch.arange(PATCHES, device=grid.device)
    token, inside = index // 9, index % 9
    rows, columns = grid[:, :1].long(), grid[:, 1:].long()
    x = (token % columns) * 3 + inside % 3
    y = (token // columns) * 3 + inside // 3
    return Positions(x, y, token < rows * columns)


def pixel_coordinates(positions_x: Tensor, positions_y: Tensor, stretch: Tensor) -> tuple[Tensor, Tensor]:
    """Canvas coordinates of every pixel, float32 [pictures, PATCHES * 256] in x and y."""
    pixel = torch.arange(PATCH * PATCH, device=stretch.device)
    x = (positions_x[..., None] * PATCH + pixel % PATCH).flatten(1).float() + 0.5
    y = (positions_y[..., None] * PATCH + pixel // PATCH).flatten(1).float() + 0.5
    return x * stretch[:, :1], y * stretch[:, 1:]


def _ground(look: Tensor, x: Tensor, y: Tensor, canvas: Tensor) -> list[Tensor]:
    rise = look[:, 3:4] * (x / canvas[:, :1] - 0.5) + look[:, 4:5] * (y / canvas[:, 1:] - 0.5)
    return [(look[:, channel : channel + 1] + rise).clamp(0, 255) for channel in range(3)]


def _finish(channels: list[Tensor], look: Tensor, noise: Tensor) -> Tensor:
    """Noise and rounding to whole levels; [pictures, pixels, 3] in 0..255."""
    color = torch.stack(channels, -1) + noise * look[:, 5][:, None, None]
    return color.clamp(0, 255).round()


def _places(x: Tensor, y: Tensor, grid: Tensor, canvas: Tensor) -> Tensor:
    """Which of the nine places of ``Canvas.place`` a point is in, int64 like x."""
    rows, columns = grid[:, :1], grid[:, 1:]
    row, column = columns >= 3.75 * rows, rows >= 3.75 * columns
    across = torch.where(row, 9, torch.where(column, 1, 3))
    down = torch.where(row, 1, torch.where(column, 9, 3))
    at_x = torch.minimum((x / canvas[:, :1] * across).floor(), across - 1.0)
    at_y = torch.minimum((y / canvas[:, 1:] * down).floor(), down - 1.0)
    return (at_y * across + at_x).long()


def draw_shapes(
    shapes: Tensor,
    look: Tensor,
    grid: Tensor,
    stretch: Tensor,
    positions_x: Tensor,
    positions_y: Tensor,
    noise: Tensor,
) -> Tensor:
    """Pictures of shapes.

    shapes [n, 9 places, 10], look [n, 7], grid and stretch [n, 2], positions [n, PATCHES], noise
    [n, PATCHES * 256, 3]. Returns [n, PATCHES * 256, 3] in 0..255.
    """
    x, y = pixel_coordinates(positions_x, positions_y, stretch)
    canvas = grid.flip(1).float() * 48 * stretch
    # A shape stays inside its place, so every pixel has at most one.
    place = _places(x, y, grid, canvas)
    kind, center_x, center_y, radius, cos, sin, ring, *rgb = (
        torch.gather(shapes[:, :, field], 1, place) for field in range(shapes.shape[2])
    )
    across, down = x - center_x, y - center_y
    u, v = (across * cos + down * sin) / radius, (down * cos - across * sin) / radius
    abs_u, abs_v = u.abs(), v.abs()
    distance = (u * u + v * v).sqrt()
    # Signed distances to the outlines, in radii, negative inside.
    circle = distance - 1.0
    square = torch.maximum(abs_u, abs_v) - 0.85
    triangle = torch.maximum(v - 0.8, (1.8 * abs_u - v - 1) / 2.0591)
    turn = torch.atan2(abs_u, -v)
    turn = (
        turn - _STAR_STEP * torch.floor(turn / _STAR_STEP + 0.5)
    ).abs()  # folded to half a point of the star
    star = (distance * torch.sin(turn) * 0.66021 + (distance * torch.cos(turn) - 1) * 0.24687) / 0.70486
    cross = torch.minimum(torch.maximum(abs_u - 0.3, abs_v - 1), torch.maximum(abs_v - 0.3, abs_u - 1))
    hoop = torch.maximum(distance - 1, 1 - ring - distance)
    result = circle
    for index, other in enumerate((square, triangle, star, cross, hoop), start=1):
        result = torch.where(kind == index, other, result)
    cover = torch.where(kind < 0, 0.0, (0.5 - result * radius / look[:, 6:7]).clamp(0, 1))
    channels = [
        below + cover * (color - below) for color, below in zip(rgb, _ground(look, x, y, canvas), strict=True)
    ]
    return _finish(channels, look, noise)


def draw_signs(
    signs: Tensor,
    masks: Tensor,
    look: Tensor,
    grid: Tensor,
    stretch: Tensor,
    positions_x: Tensor,
    positions_y: Tensor,
    noise: Tensor,
) -> Tensor:
    """Pictures of signs; signs [n, 16], masks uint8 [n, MASK_CAPACITY], the rest and the result as in
    draw_shapes.
    """
    x, y = pixel_coordinates(positions_x, positions_y, stretch)
    canvas = grid.flip(1).float() * 48 * stretch
    center_x, center_y, cos, sin, half_width, half_height, scale, width, height = (
        signs[:, field : field + 1] for field in range(9)
    )
    across, down = x - center_x, y - center_y
    u, v = across * cos + down * sin, down * cos - across * sin
    plate = (0.5 - torch.maximum(u.abs() - half_width, v.abs() - half_height) / look[:, 6:7]).clamp(0, 1)
    column, line = u / scale + width / 2 - 0.5, v / scale + height / 2 - 0.5
    left, top = column.floor(), line.floor()
    right_part, bottom_part = column - left, line - top

    def tap(at_x: Tensor, at_y: Tensor) -> Tensor:
        inside = (at_x >= 0) & (at_y >= 0) & (at_x < width) & (at_y < height)
        index = torch.where(inside, (at_y * width + at_x).long(), 0)
        return torch.where(inside, torch.gather(masks, 1, index).float(), 0.0)

    upper = tap(left, top) * (1 - right_part) + tap(left + 1, top) * right_part
    lower = tap(left, top + 1) * (1 - right_part) + tap(left + 1, top + 1) * right_part
    ink = (upper * (1 - bottom_part) + lower * bottom_part) / 255
    channels = []
    for channel, below in enumerate(_ground(look, x, y, canvas)):
        color = below + plate * signs[:, 15:16] * (signs[:, 9 + channel : 10 + channel] - below)
        channels.append(color + ink * (signs[:, 12 + channel : 13 + channel] - color))
    return _finish(channels, look, noise)
