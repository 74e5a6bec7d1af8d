"""The demo's pictures, questions, tokens and training fit together, and the shipped checkpoint answers."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

from gemcut.demo import (
    CHECKPOINT,
    PICTURES,
    evaluate,
    export,
    fonts,
    net,
    render,
    render_pil,
    rows,
    scenes,
    tokenizer,
    train,
)
from gemcut.demo.questions import KINDS, ask_shapes, ask_sign, ask_text, ask_two, with_article

TINY = rows.Layout(shapes=2, signs=2, pairs=1, texts=1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def canvas(rng: random.Random) -> scenes.Canvas:
    return scenes.Canvas.of(*scenes.sample_size(rng))


def maker(seed: int, **options) -> rows.BatchMaker:
    return rows.BatchMaker(TINY, random.Random(seed), tokenizer.Encoder(), fonts.faces(False), **options)


# ------------------------------------------------------------------------------------------------ scenes


def test_the_grid_is_the_processors():
    rng = random.Random(0)
    for _ in range(3000):
        height, width = scenes.sample_size(rng)
        want = get_aspect_ratio_preserving_size(height, width, 16, 9 * scenes.BUDGET, 3)
        assert tuple(side // scenes.CELL for side in want) == scenes.target_grid(height, width)


def test_extreme_strips_are_among_the_grids():
    rng = random.Random(1)
    grids = {scenes.target_grid(*scenes.sample_size(rng)) for _ in range(20_000)}
    assert len(grids) > 120
    assert (1, 70) in grids
    assert (70, 1) in grids


def test_scenes_are_a_function_of_the_seed():
    def draw(seed: int) -> list[scenes.Scene]:
        rng = random.Random(seed)
        return [
            scene
            for _ in range(10)
            for scene in (
                scenes.sample_shapes(rng, canvas(rng)),
                scenes.sample_sign(rng, canvas(rng), fonts.faces(False)),
            )
        ]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_shapes_stay_in_their_places():
    rng = random.Random(2)
    for _ in range(300):
        scene = scenes.sample_shapes(rng, canvas(rng))
        for shape in scene.shapes:
            x, y, width, height = scene.canvas.place(shape.place)
            assert abs(shape.x - x) + shape.radius <= width / 2 + 1e-6
            assert abs(shape.y - y) + shape.radius <= height / 2 + 1e-6


def test_signs_fit_and_are_legible():
    rng = random.Random(3)
    small = 0
    for _ in range(500):
        scene = scenes.sample_sign(rng, canvas(rng), fonts.faces(True))
        cos, sin = np.cos(scene.angle), abs(np.sin(scene.angle))
        reach_x, reach_y = (
            scene.half_width * cos + scene.half_height * sin,
            scene.half_height * cos + scene.half_width * sin,
        )
        assert reach_x - 1e-6 <= scene.x <= scene.canvas.width - reach_x + 1e-6
        assert reach_y - 1e-6 <= scene.y <= scene.canvas.height - reach_y + 1e-6
        small += scene.em / max(scene.canvas.stretch) < 26
    assert small <= 10  # long words in narrow pictures


def test_held_out_items_are_not_trained_on():
    rng = random.Random(4)
    trained_families = {fonts.family(Path(face)) for family in fonts.faces(False) for face in family}
    held_families = {fonts.family(Path(face)) for family in fonts.faces(True) for face in family}
    assert not trained_families & held_families
    assert len(held_families) >= 2
    seen = {scenes.sample_text(rng) for _ in range(3000)}
    unseen = {scenes.sample_text(rng, unseen=True) for _ in range(300)}
    assert not seen & unseen

    def combinations(scene: scenes.ShapeScene) -> list[str]:
        return [f"{shape.name} {scene.canvas.layout} {shape.place}" for shape in scene.shapes]

    for _ in range(200):
        assert not any(map(scenes.held_out, combinations(scenes.sample_shapes(rng, canvas(rng)))))
        assert any(map(scenes.held_out, combinations(scenes.sample_shapes(rng, canvas(rng), unseen=True))))


# --------------------------------------------------------------------------------------------- questions


def test_answers_agree_with_the_scene():
    rng = random.Random(6)
    for _ in range(300):
        scene = scenes.sample_shapes(rng, canvas(rng))
        for qa in ask_shapes(rng, scene):
            words = qa.question.lower().rstrip("?.").split()
            if qa.kind == "count":
                assert int(qa.answer) == len(scene.shapes)
            elif qa.kind == "list":
                assert qa.answer.split(", ") == [shape.name for shape in scene.shapes]
            elif qa.kind == "exists":
                named = any(shape.color in words and shape.kind in words for shape in scene.shapes)
                assert qa.answer == ("yes" if named else "no")
            elif qa.kind == "count_color":
                assert int(qa.answer) == sum(shape.color in words for shape in scene.shapes)
            elif qa.kind == "where_of":
                (shape,) = (shape for shape in scene.shapes if shape.color in words and shape.kind in words)
                assert qa.answer == scene.canvas.place_name(shape.place)
            elif qa.kind == "describe":
                said = qa.answer.lower().removesuffix(
                    f" on {with_article(scene.look.background)} background."
                )
                assert said.replace(" and ", ", ").split(", ") == [
                    with_article(shape.name) for shape in scene.shapes
                ]


def test_two_pictures_and_signs():
    rng = random.Random(7)
    for _ in range(100):
        first, second = scenes.sample_shapes(rng, canvas(rng)), scenes.sample_shapes(rng, canvas(rng))
        for qa in ask_two(rng, first, second):
            if qa.kind == "which_more":
                assert (qa.answer == "first") == (len(first.shapes) > len(second.shapes))
            elif qa.kind == "count_in":
                assert int(qa.answer) == len((first if "first" in qa.question else second).shapes)
        sign = scenes.sample_sign(rng, canvas(rng), fonts.faces(False))
        assert ask_sign(rng, sign)[0].answer == sign.text


def test_every_kind_is_asked():
    rng = random.Random(8)
    kinds = set()
    for _ in range(200):
        first, second = (scenes.sample_shapes(rng, canvas(rng), most=3) for _ in range(2))
        sign = scenes.sample_sign(rng, canvas(rng), fonts.faces(False))
        for asked in (
            ask_shapes(rng, first),
            ask_two(rng, first, second),
            ask_sign(rng, sign),
            [ask_text(rng)],
        ):
            kinds |= {qa.kind for qa in asked}
    assert kinds == set(KINDS) - {"thought"}


# --------------------------------------------------------------------------------------------- rendering


def torch_picture(scene: scenes.Scene) -> np.ndarray:
    """The scene as the training draws it, put back in reading order."""
    grid = torch.tensor([[scene.canvas.rows, scene.canvas.columns]])
    positions = render.patch_positions(grid)
    common = (
        torch.tensor([rows.look_vector(scene, 1.0)]), grid, torch.tensor([scene.canvas.stretch]),
        positions.x, positions.y, torch.zeros(1, render.PATCHES * 256, 3),
    )  # fmt: skip
    if isinstance(scene, scenes.ShapeScene):
        drawn = render.draw_shapes(torch.from_numpy(rows.shape_vectors(scene))[None], *common)
    else:
        mask, _, scale = scenes.lettering_of(scene, rows.fitting_detail(scene, 1.0))
        masks = torch.zeros(1, scenes.MASK_CAPACITY, dtype=torch.uint8)
        masks[0, : mask.width * mask.height] = torch.from_numpy(np.array(mask)).flatten()
        drawn = render.draw_signs(torch.tensor([rows.sign_vector(scene, mask.size, scale)]), masks, *common)
    count = scene.canvas.rows * scene.canvas.columns * 9
    image = np.zeros((scene.canvas.rows * 48, scene.canvas.columns * 48, 3))
    for patch in range(count):
        x, y = int(positions.x[0, patch]) * 16, int(positions.y[0, patch]) * 16
        image[y : y + 16, x : x + 16] = drawn[0].view(-1, 16, 16, 3)[patch].numpy()
    return image


@pytest.mark.parametrize("sort", ["shapes", "sign"])
def test_the_renderers_agree(sort: str):
    rng = random.Random(9)
    for _ in range(6):
        height, width = scenes.sample_size(rng)
        place = scenes.Canvas.of(height, width)
        scene = (
            scenes.sample_shapes(rng, place)
            if sort == "shapes"
            else scenes.sample_sign(rng, place, fonts.faces(True))
        )
        scene = replace(scene, look=replace(scene.look, noise=0.0, blur=0.0))
        size = (place.columns * 48, place.rows * 48)
        truth = render_pil.draw(scene, 2 * height, 2 * width).resize(size, Image.Resampling.BICUBIC)
        difference = np.abs(torch_picture(scene) - np.asarray(truth, np.float64))
        assert difference.mean() < 1.5
        assert (difference.max(-1) > 60).mean() < 0.02  # only along edges


# -------------------------------------------------------------------------------------- tokens and rows


def test_letters_and_digits_are_single_tokens():
    encoder = tokenizer.Encoder()
    for text in ("QWXZ", "A1B2", "0042", " STOP"):
        assert len(encoder(text)) == len(text)
    assert encoder.tokenizer.get_vocab_size() <= tokenizer.VOCABULARY
    assert encoder.tokenizer.to_str() == tokenizer.Encoder().tokenizer.to_str()


def test_rows_tokenize_as_one_text():
    batch = TINY.views(maker(10).make())
    encoder = tokenizer.Encoder()
    image = tokenizer.SPECIAL_ID["<|image|>"]
    for ids in batch["ids"].tolist():
        ids = ids[: len(ids) - next(n for n, token in enumerate(reversed(ids)) if token)]
        text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
        assert list(encoder(text)) == ids
    for picture, start in enumerate(batch["start"]):
        count = int(batch["grid"][picture].prod())
        flat = batch["ids"].reshape(-1)
        assert (flat[start : start + count] == image).all()
        assert flat[start - 1] != image
        assert flat[start + count] != image
    assert (batch["kind"] >= 0).sum() > 50


def test_all_orders_appear():
    orders = {(item.order, len(item.pictures)) for item in evaluate.held_out_items(3, 60)}
    assert orders == {(0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2)}


# ------------------------------------------------------------------------------------ training and export


def test_two_training_steps_and_export(tmp_path: Path):
    arguments = train.parser().parse_args(["--seconds", "60"])
    trainer = train.Trainer(TINY, net.Size(), arguments, torch.device("cpu"))
    trainer.load(maker(11).make())
    trainer.calibrate()
    trainer.optimizer.rate.fill_(0.02)
    for _ in range(2):
        trainer.step()
    assert torch.isfinite(trainer.sums).all()
    assert trainer.sums[6] == 2
    result = trainer.validate([maker(12).make()])
    assert sum(count for _, count in result.values()) > 10

    state = trainer.state()
    export.write(state, net.Size(), tmp_path)
    model, report = transformers.Gemma4ForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(value, state[name].bfloat16().float()), name
    assert model.config.vision_soft_tokens_per_image == scenes.BUDGET
    assert model.generation_config.eos_token_id == [1, 6, 14]


def test_the_net_is_transformers_gemma_4():
    """On the shipped weights, logits of a batch with every sort of row agree."""
    model = transformers.Gemma4ForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32
    ).eval()
    arguments = train.parser().parse_args(["--start", str(CHECKPOINT)])
    trainer = train.Trainer(TINY, net.Size(), arguments, torch.device("cpu"))
    trainer.load(maker(13).make())
    pixels, positions = trainer.pictures()
    batch, ids = trainer.batch, trainer.batch["ids"].long()
    tokens = batch["grid"].prod(1).long()
    with torch.no_grad():
        soft = trainer.net.soft_tokens(pixels, positions)
        ours = trainer.net.logits(
            trainer.net.text(trainer.net.embed(ids, soft, batch["start"], tokens), ids)[0]
        )
        patches, places = [], []
        for picture in batch["start"].argsort().tolist():  # transformers wants the patches in reading order
            count = int(positions.valid[picture].sum())
            x, y = positions.x[picture, :count], positions.y[picture, :count]
            order = (y * 1000 + x).argsort()
            patches.append(
                torch.cat([pixels[picture, :count][order] / 2 + 0.5, torch.zeros(630 - count, 768)])
            )
            places.append(torch.cat([torch.stack([x, y], -1)[order], torch.full((630 - count, 2), -1)]))
        theirs = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.stack(patches),
            image_position_ids=torch.stack(places),
            mm_token_type_ids=(ids == model.config.image_token_id).long(),
        ).logits  # fmt: skip
    assert (ours - theirs)[ids != 0].abs().max() < 2e-3


# ------------------------------------------------------------------------------------ the shipped model


def test_the_shipped_checkpoint_is_small():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 8_000_000
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) < 150_000


def test_the_shipped_checkpoint_answers_held_out_pictures():
    items = list(itertools.islice(evaluate.held_out_items(77, 40), 40))
    outcomes = evaluate.evaluate(evaluate.TransformersEngine(CHECKPOINT, "float32"), items)
    wrong = [(outcome.question, outcome.expected, outcome.got) for outcome in outcomes if not outcome.right]
    assert len(wrong) <= 0.05 * len(outcomes), wrong


def test_the_samples_are_answered():
    engine = evaluate.TransformersEngine(CHECKPOINT, "float32")

    def ask(question: str, *names: str) -> str:
        images = tuple(Image.open(PICTURES / name).convert("RGB") for name in names)
        return engine(evaluate.Item(evaluate.QA("", question, ""), images, len(images)))

    assert ask("What does the sign say?", "sign.png") == "GEMCUT"
    assert ask("How many shapes are there?", "shapes.png") == "5"
    assert ask("Which image has more shapes?", "first.png", "second.png") == "second"
