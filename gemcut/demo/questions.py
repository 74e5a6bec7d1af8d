"""Questions about scenes and their answers, every answer a fixed function of the scene."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from gemcut.demo.scenes import COLOR_NAMES, DIGITS, LETTERS, SHAPES, Shape, ShapeScene, SignScene, held_out


class QA(NamedTuple):
    """One question with its answer; ``kind`` is the row of the accuracy table it counts for."""

    kind: str
    question: str
    answer: str


# {image} becomes "image" or "picture", {color} "color" or "colour"; the first phrasing is the usual one.
PHRASES: dict[str, list[str]] = {
    "shape": ["What shape is it?", "What is the shape?", "Which shape is this?"],
    "color": ["What {color} is it?", "What {color} is the shape?", "Which {color} is it?"],
    "where": ["Where is it?", "Where is the shape?"],
    "where_of": ["Where is the {item}?", "Where's the {item}?", "Find the {item}."],
    "color_of": [
        "What {color} is the {shape}?",
        "Which {color} is the {shape}?",
        "What {color} does the {shape} have?",
    ],
    "shape_of": ["What shape is {hue}?", "Which shape is {hue}?", "What is {hue}?"],
    "count": [
        "How many shapes are there?",
        "How many shapes?",
        "Count the shapes.",
        "How many shapes do you see?",
        "How many shapes are in the {image}?",
    ],
    "count_shape": [
        "How many {shapes} are there?",
        "How many {shapes}?",
        "Count the {shapes}.",
        "How many {shapes} are in the {image}?",
    ],
    "count_color": [
        "How many {hue} shapes are there?",
        "How many {hue} shapes?",
        "Count the {hue} shapes.",
        "How many shapes are {hue}?",
    ],
    "list": [
        "List all shapes.",
        "List the shapes.",
        "Which shapes are there?",
        "What shapes are in the {image}?",
    ],
    "exists": [
        "Is there {an_item}?",
        "Do you see {an_item}?",
        "Can you see {an_item}?",
        "Is there {an_item} in the {image}?",
    ],
    "describe": [
        "Describe the {image}.",
        "Describe this {image}.",
        "What is in the {image}?",
        "What do you see?",
        "What does the {image} show?",
    ],
    "background": ["What {color} is the background?", "Which {color} is the background?"],
    "read": [
        "What does the sign say?",
        "What does it say?",
        "Read the sign.",
        "What is written on the sign?",
        "What is on the sign?",
    ],
    "sign_color": ["What {color} is the sign?", "Which {color} is the sign?"],
    "which_image": [
        "Which {image} has the {item}?",
        "Which {image} has {an_item}?",
        "In which {image} is the {item}?",
    ],
    "which_more": ["Which {image} has more shapes?", "In which {image} are more shapes?"],
    "color_in": [
        "What {color} is the shape in the {nth} {image}?",
        "Which {color} is the shape in the {nth} {image}?",
    ],
    "shape_in": ["What shape is in the {nth} {image}?", "Which shape is in the {nth} {image}?"],
    "count_in": ["How many shapes are in the {nth} {image}?", "How many shapes does the {nth} {image} have?"],
    "repeat": ["Repeat: {text}"],
    "reverse": ["Reverse: {text}"],
    "add": ["What is {a} + {b}?", "{a} + {b} = ?"],
}
KINDS = [
    "shape", "color", "where", "where_of", "color_of", "shape_of", "count", "count_shape", "count_color",
    "list", "exists", "describe", "describe_sign", "background", "read_word", "read_number", "sign_color",
    "which_image", "which_more", "color_in", "shape_in", "count_in", "repeat", "reverse", "add", "thought",
]  # fmt: skip


def plural(shape: str) -> str:
    """Two of that shape."""
    return shape + ("es" if shape == "cross" else "s")


def with_article(noun: str) -> str:
    """With "a" or "an" in front."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def phrase(rng: random.Random | None, key: str, **fields: str) -> str:
    """A question in one of its phrasings, now and then careless about capitals and the final mark.

    Without ``rng`` the usual phrasing.
    """
    if rng is None:
        return PHRASES[key][0].format(image="image", color="color", **fields)
    template = rng.choice(PHRASES[key]) if rng.random() < 0.6 else PHRASES[key][0]
    image, color = rng.choice(["image", "picture"]), rng.choices(["color", "colour"], [3, 1])[0]
    text = template.format(image=image, color=color, **fields)
    if key not in ("repeat", "reverse", "add"):
        if rng.random() < 0.08:
            text = text[0].lower() + text[1:]
        if rng.random() < 0.08:
            text = text[:-1]
    return text


def describe(scene: ShapeScene | SignScene) -> str:
    """The canonical sentence: every shape in reading order, then the background."""
    if isinstance(scene, SignScene):
        inside = f"{with_article(f'{scene.plate} sign')} that says {scene.text}"
    else:
        names = [with_article(shape.name) for shape in scene.shapes]
        inside = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    sentence = f"{inside} on {with_article(f'{scene.look.background} background')}."
    return sentence[0].upper() + sentence[1:]


def describe_all(scenes: Sequence[ShapeScene | SignScene]) -> str:
    """One sentence a picture: what the model thinks when thinking is on."""
    return "\n".join(describe(scene) for scene in scenes)


def _unique(shapes: tuple[Shape, ...], field: str) -> list[Shape]:
    counts = Counter(getattr(shape, field) for shape in shapes)
    return [shape for shape in shapes if counts[getattr(shape, field)] == 1]


def ask_shapes(rng: random.Random, scene: ShapeScene) -> list[QA]:
    """Questions about one picture of shapes, in no particular order."""
    shapes = scene.shapes
    names, kinds, colors = (
        [getattr(shape, field) for shape in shapes] for field in ("name", "kind", "color")
    )
    asked = []
    if len(shapes) == 1:
        only = shapes[0]
        asked += [
            QA("shape", phrase(rng, "shape"), only.kind),
            QA("color", phrase(rng, "color"), only.color),
            QA("where", phrase(rng, "where"), scene.canvas.place_name(only.place)),
        ]
    else:
        single = _unique(shapes, "name")
        for shape in rng.sample(single, min(2, len(single))):
            asked.append(
                QA("where_of", phrase(rng, "where_of", item=shape.name), scene.canvas.place_name(shape.place))
            )
        if single := _unique(shapes, "kind"):
            shape = rng.choice(single)
            asked.append(QA("color_of", phrase(rng, "color_of", shape=shape.kind), shape.color))
        if single := _unique(shapes, "color"):
            shape = rng.choice(single)
            asked.append(QA("shape_of", phrase(rng, "shape_of", hue=shape.color), shape.kind))
    kind = rng.choice(kinds if rng.random() < 0.75 else SHAPES)
    color = rng.choice(colors if rng.random() < 0.75 else COLOR_NAMES)
    asked += [
        QA("count", phrase(rng, "count"), str(len(shapes))),
        QA("count_shape", phrase(rng, "count_shape", shapes=plural(kind)), str(kinds.count(kind))),
        QA("count_color", phrase(rng, "count_color", hue=color), str(colors.count(color))),
        QA("list", phrase(rng, "list"), ", ".join(names)),
        QA("describe", phrase(rng, "describe"), describe(scene)),
        QA("background", phrase(rng, "background"), scene.look.background),
    ]
    for _ in range(2):
        name = (
            rng.choice(names)
            if rng.random() < 0.5
            else f"{rng.choice(colors + COLOR_NAMES)} {rng.choice(kinds + SHAPES)}"
        )
        asked.append(
            QA("exists", phrase(rng, "exists", an_item=with_article(name)), "yes" if name in names else "no")
        )
    return asked


def ask_sign(rng: random.Random, scene: SignScene) -> list[QA]:
    """Questions about a picture of a sign; the first one is to read it."""
    asked = [QA("read_number" if scene.text.isdigit() else "read_word", phrase(rng, "read"), scene.text)]
    asked.append(QA("background", phrase(rng, "background"), scene.look.background))
    if scene.plate is not None:
        asked.append(QA("sign_color", phrase(rng, "sign_color"), scene.plate))
        asked.append(QA("describe_sign", phrase(rng, "describe"), describe(scene)))
    return asked


def ask_two(rng: random.Random, first: ShapeScene, second: ShapeScene) -> list[QA]:
    """Questions about two pictures."""
    names = [{shape.name for shape in scene.shapes} for scene in (first, second)]
    differing = sorted((name, "first") for name in names[0] - names[1]) + sorted(
        (name, "second") for name in names[1] - names[0]
    )
    asked = []
    for name, answer in rng.sample(differing, min(2, len(differing))):
        asked.append(
            QA("which_image", phrase(rng, "which_image", item=name, an_item=with_article(name)), answer)
        )
    if len(first.shapes) != len(second.shapes):
        asked.append(
            QA(
                "which_more",
                phrase(rng, "which_more"),
                "first" if len(first.shapes) > len(second.shapes) else "second",
            )
        )
    for scene, nth in ((first, "first"), (second, "second")):
        asked.append(QA("count_in", phrase(rng, "count_in", nth=nth), str(len(scene.shapes))))
        if len(scene.shapes) == 1:
            asked.append(QA("color_in", phrase(rng, "color_in", nth=nth), scene.shapes[0].color))
            asked.append(QA("shape_in", phrase(rng, "shape_in", nth=nth), scene.shapes[0].kind))
    return asked


def ask_text(rng: random.Random, unseen: bool = False) -> QA:
    """A question without a picture. ``unseen``: of a held-out string (sums of two digits are too few to hold
    out).
    """
    kind = rng.choices(["repeat", "reverse", "add"], [40, 35, 25])[0]
    if kind == "add":
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        return QA(kind, phrase(rng, kind, a=str(a), b=str(b)), str(a + b))
    while True:
        if kind == "repeat":
            text = answer = "".join(rng.choices(LETTERS + DIGITS, k=rng.randint(2, 6)))
        else:
            text = "".join(rng.choices(DIGITS, k=rng.randint(2, 4)))
            answer = text[::-1]
        if held_out(text) == unseen:
            return QA(kind, phrase(rng, kind, text=text), answer)
