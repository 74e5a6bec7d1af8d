"""The engine as the benchmarks drive it: what runs, what is counted, what is shared."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_rig import setup, start, write_config

from gemcut.bench.contender import Gemcut, by_turns, picture_prompt, random_picture, release, text_prompt
from gemcut.errors import ConfigError


def test_every_answer_has_its_tokens_and_its_times(moe: Gemcut) -> None:
    prompts = [text_prompt(moe.plan, 20, seed=i) for i in range(3)]
    trace = moe.generate(prompts, 5)
    assert [len(answer) for answer in trace.answers] == [5, 5, 5]
    assert trace.most_running == 3
    assert trace.preemptions == 0
    assert len(trace.step_s) == 4  # the first tokens come from the prompts' own step
    assert all(0 < first < trace.wall_s for first in trace.first_token_s)
    assert sum(trace.step_s) < trace.wall_s


def test_the_same_seed_gives_the_same_weights_and_answers(moe: Gemcut, moe_config: Path) -> None:
    again, other = start(moe_config), start(moe_config, seed=1)
    prompt = text_prompt(moe.plan, 20, seed=0)
    first, second, third = (c.generate([prompt], 8).answers for c in (moe, again, other))
    assert first == second != third
    release([again, other])


def test_siblings_share_weights_and_have_their_own_settings(moe_config: Path) -> None:
    versus = {"one": {"graphs": "auto"}, "two": {"graphs": "off"}}
    one, two = setup(moe_config, versus).start()
    assert (one.name, two.name) == ("one", "two")
    assert (one.config.graphs, two.config.graphs) == ("auto", "off")
    places = [{p.data_ptr() for p in c.runner.model.parameters()} for c in (one, two)]
    assert places[0] == places[1]
    assert one.runner.kv.layers[0].k_pages.data_ptr() != two.runner.kv.layers[0].k_pages.data_ptr()
    prompt = text_prompt(one.plan, 20, seed=0)
    assert one.generate([prompt], 4).answers == two.generate([prompt], 4).answers
    release([one, two])


def test_decoding_stops_at_the_steps_that_were_asked_for(moe: Gemcut) -> None:
    prompts = [text_prompt(moe.plan, 20, seed=i) for i in range(2)]
    with moe.decoding(prompts) as step:
        before = moe.engine.stats().steps
        for _ in range(3):
            step()
        assert moe.engine.stats().steps == before + 3
        assert moe.engine.stats().running == 2
    assert moe.engine.idle


def test_a_picture_prompt_is_answered(moe: Gemcut) -> None:
    pictures = [random_picture(12, seed) for seed in (0, 1)]
    prompt = picture_prompt(moe.plan, pictures, 8, seed=0)
    assert [(s.start, s.stop) for s in prompt.prompt.spans] == [(1, 13), (15, 27)]
    assert len(prompt.prompt) == 2 * 14 + 8
    assert len(moe.generate([prompt], 2).answers[0]) == 2
    assert moe.engine.stats().encoder_misses >= 2


@pytest.mark.parametrize("soft_tokens", [70, 280, 1120, 7])
def test_a_random_picture_has_its_soft_tokens(soft_tokens: int) -> None:
    picture = random_picture(soft_tokens, 0)
    assert picture.soft_tokens == soft_tokens
    assert picture.pixels.shape == (picture.rows * picture.columns, 768)
    assert picture.digest != random_picture(soft_tokens, 1).digest


def test_random_prompts_hold_no_control_tokens(moe: Gemcut) -> None:
    ids = text_prompt(moe.plan, 500, seed=0).prompt.token_ids
    assert min(ids) >= 80  # of 320; the specials are below 24
    assert text_prompt(moe.plan, 500, seed=1).prompt.token_ids != ids


def test_a_size_that_is_not_built_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clipped linears"):
        start(write_config(tmp_path, "ple"))


def test_turns_begin_with_another_contender_each_round() -> None:
    class Side:
        def __init__(self, name: str) -> None:
            self.name = name

    order: list[str] = []

    def run(side: Side, number: int) -> int:
        order.append(side.name)
        return number

    sides = [Side(name) for name in "abc"]
    found = by_turns(sides, 4, run)  # type: ignore[type-var]
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert found == {name: [0, 1, 2, 3] for name in "abc"}
