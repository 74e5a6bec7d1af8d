"""The sample pictures in ``pictures/``: python -m gemcut.demo.samples draws them again."""

import random
from dataclasses import replace

from gemcut.demo import PICTURES, fonts, render_pil
from gemcut.demo.lettering import Style
from gemcut.demo.questions import describe
from gemcut.demo.scenes import Canvas, Look, Scene, ShapeScene, sample_shapes, sample_sign

# File name, height, width, seed of the scene, and the number of shapes or the sign's text.
_SAMPLES: list[tuple[str, int, int, int, int | str]] = [
    ("shapes.png", 360, 480, 4, 5),
    ("sign.png", 320, 512, 6, "GEMCUT"),
    ("first.png", 240, 320, 21, 1),
    ("second.png", 320, 320, 33, 3),
]


def scene(height: int, width: int, seed: int, content: int | str) -> Scene:
    """A clean scene: no noise, no blur, a plain font."""
    rng = random.Random(seed)
    canvas = Canvas.of(height, width)
    look = Look("gray", (150, 152, 149), 0.0, 0.0, noise=0.0, blur=0.0)
    if isinstance(content, str):
        faces = fonts.faces(held_out=False)
        bold = next(face for family in faces for face in family if face.endswith("DejaVuSans-Bold.ttf"))
        sign = sample_sign(rng, canvas, [[bold]], smallest=70, text=content, variety=0.0)
        return replace(sign, look=look, style=Style(bold))
    while True:
        found = sample_shapes(rng, canvas)
        if len(found.shapes) == content and found.look.background == "gray":
            return ShapeScene(canvas, look, found.shapes)


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for name, height, width, seed, content in _SAMPLES:
        drawn = scene(height, width, seed, content)
        render_pil.draw(drawn, height, width).save(PICTURES / name, optimize=True)
        print(f"{name}: {describe(drawn)}")


if __name__ == "__main__":
    main()
