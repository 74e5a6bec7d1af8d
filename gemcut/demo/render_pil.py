"""Scenes drawn with PIL, as a user's picture would come: the truth for the evaluation and for the samples."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from gemcut.demo.scenes import Scene, Shape, ShapeScene, SignScene, lettering_of


def _outline(kind: str) -> list[tuple[float, float]]:
    """Corners of a polygon shape, in radii around its center, y down."""
    if kind == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if kind == "triangle":
        return [(0, -1), (1, 0.8), (-1, 0.8)]
    if kind == "cross":
        a = 0.3
        return [
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        ]
    if kind == "star":
        return [
            (length * math.sin(index * math.pi / 5), -length * math.cos(index * math.pi / 5))
            for index in range(10)
            for length in [1 if index % 2 == 0 else 0.42]
        ]
    raise ValueError(f"{kind} is not a polygon")


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, scale: float) -> None:
    x, y, radius = shape.x * scale, shape.y * scale, shape.radius * scale
    box = [x - radius, y - radius, x + radius, y + radius]
    if shape.kind == "circle":
        pen.ellipse(box, fill=shape.rgb)
    elif shape.kind == "ring":
        pen.ellipse(box, outline=shape.rgb, width=max(2, round(radius * shape.ring)))
    else:
        cos, sin = math.cos(shape.angle), math.sin(shape.angle)
        points = [
            (x + radius * (px * cos - py * sin), y + radius * (px * sin + py * cos))
            for px, py in _outline(shape.kind)
        ]
        pen.polygon(points, fill=shape.rgb)


def _draw_sign(image: Image.Image, scene: SignScene, scale: float) -> None:
    lettering, _, _ = lettering_of(scene, scale)
    width, height = max(1, round(2 * scene.half_width * scale)), max(1, round(2 * scene.half_height * scale))
    ink = Image.new("L", (width, height), 0)
    ink.paste(lettering, ((width - lettering.width) // 2, (height - lettering.height) // 2))
    board = Image.new("RGBA", (width, height), (*scene.plate_rgb, 255))
    board.paste(Image.new("RGBA", (width, height), (*scene.ink_rgb, 255)), mask=ink)
    if scene.plate is None:
        board = Image.new("RGBA", (width, height), (*scene.ink_rgb, 0))
        board.putalpha(ink)
    board = board.rotate(-math.degrees(scene.angle), expand=True, resample=Image.Resampling.BILINEAR)
    corner = (round(scene.x * scale - board.width / 2), round(scene.y * scale - board.height / 2))
    image.paste(board, corner, board)


def draw(scene: Scene, height: int, width: int, seed: int = 0) -> Image.Image:
    """The scene as an RGB picture of this many px (of the canvas's aspect ratio); ``seed`` is the noise's."""
    scale = width / scene.canvas.width
    look = scene.look
    rise_x = look.slope_x * ((np.arange(width) + 0.5) / width - 0.5)
    rise_y = look.slope_y * ((np.arange(height) + 0.5) / height - 0.5)
    ground = np.array(look.rgb, np.float32) + (rise_x[None, :] + rise_y[:, None])[..., None]
    image = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    if isinstance(scene, ShapeScene):
        pen = ImageDraw.Draw(image)
        for shape in scene.shapes:
            _draw_shape(pen, shape, scale)
    else:
        _draw_sign(image, scene, scale)
    if look.blur:
        image = image.filter(ImageFilter.GaussianBlur(look.blur * scale))
    if look.noise:
        noise = np.random.default_rng(seed).normal(0, look.noise, (height, width, 3))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).round().astype(np.uint8))
    return image
