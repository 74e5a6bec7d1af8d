"""A row whose numbers break ends its own request and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import rig
import torch

from gemcut.data import Step

PICTURE = rig.ask("<bos>see ", rig.picture(200, 300, 70), " this")
TEXTS = [rig.ask("<bos>once upon a time there was"), rig.ask("<bos>a list of numbers: 1, 2, 3, 4, 5, 6")]
NAN = float("nan")


@pytest.fixture(scope="module", params=["dense", "moe"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> rig.Rig:
    folder = tmp_path_factory.mktemp(request.param)
    rig.save(folder, request.param)
    return rig.Rig(folder)


@pytest.fixture
def runner(loaded: rig.Rig) -> Iterator[rig.Rig]:
    yield loaded
    loaded.release_all()


def run(runner: rig.Rig, *, poisoned: bool, steps: int = 4) -> tuple[list[Any], list[torch.Tensor]]:
    """A picture between two texts, then decode rows; results, and the logits of each step."""
    seated = [runner.seat(slot, asked) for slot, asked in enumerate((TEXTS[0], PICTURE, TEXTS[1]))]
    seats, items = [seat for seat, _ in seated], [item for _, found in seated for item in found]
    hooks = []
    if poisoned:
        projector = runner.runner.model.embed_vision
        hooks.append(projector.register_forward_hook(lambda _module, _args, out: out * NAN))
    results = [runner.step([runner.row(slot) for slot in range(3)], seats, items)]
    for hook in hooks:
        hook.remove()
    logits = [runner.logits()]
    slots = [0, 2] if poisoned else [0, 1, 2]
    for _ in range(steps):
        results.append(runner.step([runner.row(slot, decode=True) for slot in slots]))
        logits.append(runner.logits())
    return results, logits


def test_only_the_row_with_nan_errs(runner: rig.Rig) -> None:
    good, good_logits = run(runner, poisoned=False)
    runner.release_all()
    bad, bad_logits = run(runner, poisoned=True)
    assert [set(result.errors) for result in good] == [set()] * 5
    assert set(bad[0].errors) == {1}
    assert "not a number" in bad[0].errors[1]
    assert set(bad[0].tokens) == {0, 2}
    assert all(not result.errors for result in bad[1:])
    for before, after in zip(good, bad, strict=True):
        assert {slot: before.tokens[slot] for slot in (0, 2)} == after.tokens

    first = len(TEXTS[0].ids)
    for part in (slice(0, first), slice(first + len(PICTURE.ids), None)):
        difference = (good_logits[0][part] - bad_logits[0][part]).abs().max()
        if runner.plan.text.layers[0].experts is None:
            assert difference == 0.0, "neighbours are equal bit by bit"
        else:  # NaN goes to other experts, so theirs multiply groups of other sizes
            assert difference <= 1e-4
    begin, end = PICTURE.spans[0]
    assert bad_logits[0][first + begin : first + end].isnan().all()


def test_pages_and_slots_of_a_broken_row_serve_the_next(runner: rig.Rig) -> None:
    want = runner.prefill(3, TEXTS[1])
    runner.release(3)
    run(runner, poisoned=True, steps=0)
    left = {kind: list(pages) for kind, pages in runner._seated[1].pages.items()}
    runner.release(1)
    got = runner.prefill(1, TEXTS[1])  # the pages that came back last go out first
    for kind, pages in runner._seated[1].pages.items():
        assert set(pages) <= set(left[kind])
    assert torch.equal(got, want)


def test_a_decode_row_with_nan_in_its_cache_errs_alone(runner: rig.Rig) -> None:
    for slot, asked in enumerate(TEXTS):
        runner.prefill(slot, asked)
    want = runner.step([runner.row(0, decode=True), runner.row(1, decode=True)])
    runner.release_all()
    for slot, asked in enumerate(TEXTS):
        runner.prefill(slot, asked)
    runner.spoil("full", runner._seated[0].pages["full"][:1])
    got = runner.step([runner.row(0, decode=True), runner.row(1, decode=True)])
    assert set(got.errors) == {0}
    assert got.tokens == {1: want.tokens[1]}


def test_a_step_without_rows_encodes_and_frees(runner: rig.Rig) -> None:
    _, items = runner.seat(0, PICTURE)
    held = len(runner.runner.soft)
    result = runner.step([], encode=items)
    assert not result.tokens
    assert not result.errors
    assert len(runner.runner.soft) == held + 1
    assert runner.runner.soft[items[0].key].shape == (60, 48)
    runner.step([], free_media=[items[0].key])
    assert len(runner.runner.soft) == held
    runner.step([], encode=items)  # for the release that follows


def test_results_come_in_the_order_of_the_launches(runner: rig.Rig) -> None:
    seats = [runner.seat(slot, asked)[0] for slot, asked in enumerate(TEXTS)]
    launched = runner.runner
    launched.launch(Step(71, (runner.row(0),), (seats[0],)))
    launched.launch(Step(72, (runner.row(1),), (seats[1],)))
    launched.launch(Step(73, (runner.row(0, decode=True),)))
    results = [launched.collect() for _ in range(3)]
    assert [result.number for result in results] == [71, 72, 73]
    assert [set(result.tokens) for result in results] == [{0}, {1}, {0}]
    runner.release_all()
    runner.prefill(0, TEXTS[0])
    runner.decode(0)
    assert runner.tokens(0)[-2:] == [results[0].tokens[0], results[2].tokens[0]]
