"""What a request may ask for, what a checkpoint suggests, and that the runner keeps to both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rig
import tiny
import torch

from gemcut.data import TokenLogprobs
from gemcut.engine.model_files import ModelFiles
from gemcut.errors import CheckpointError, InvalidRequest
from gemcut.runner.sample import uniform
from gemcut.sampling import MAX_LOGPROBS, GenerationDefaults, SamplingParams

# ---- SamplingParams

NAN, INF = float("nan"), float("inf")
WRONG: dict[str, list[Any]] = {
    "n": [0, -1, 65, 1.0, True, "2", None],
    "temperature": [-0.1, 100.5, NAN, INF, "1", True],
    "top_k": [-1, 1.5, True, "5"],
    "top_p": [0.0, -0.1, 1.01, NAN, "1", False],
    "min_p": [-0.1, 1.01, NAN, "0", None],
    "presence_penalty": [-2.1, 2.1, NAN, "0", None],
    "frequency_penalty": [-2.1, 2.1, INF, "0", None],
    "repetition_penalty": [0.0, -1.0, 100.5, NAN, "1", None],
    "max_tokens": [0, -1, 2.0, True, "5"],
    "max_thought_tokens": [0, -1, 1.0, "1", True],
    "min_tokens": [-1, 2.0, True, None],
    "stop": ["", ("",), (1,), ("a", None), 5, None],
    "stop_token_ids": [5, "5", None],
    "logit_bias": [{1: 101}, {1: -100.5}, {1: NAN}, {1: "2"}, {1: True}, [1], None],
    "allowed_token_ids": [(), [], 5, "5"],
    "logprobs": [-1, MAX_LOGPROBS + 1, 1.0, True],
    "prompt_logprobs": [-1, MAX_LOGPROBS + 1, 1.0, True],
    "seed": [1.0, "1", True, 2**64, -(2**63) - 1],
}
RIGHT: dict[str, list[Any]] = {
    "n": [1, 64],
    "temperature": [0, 0.0, 1e-45, 0.7, 100, None],
    "top_k": [0, 1, 10**9, None],
    "top_p": [1e-9, 1, 1.0, None],
    "min_p": [0, 1.0],
    "presence_penalty": [-2, 2.0],
    "frequency_penalty": [-2, 2.0],
    "repetition_penalty": [1e-9, 100],
    "max_tokens": [1, None],
    "max_thought_tokens": [1, 10**6, None],
    "min_tokens": [0, 10**6],
    "stop": ["x", ("x",), ["x", "yz"], ()],
    "stop_token_ids": [(), [1, 2]],
    "logit_bias": [{}, {0: -100, 5: 100.0}],
    "allowed_token_ids": [None, [3], (0, 1)],
    "logprobs": [0, MAX_LOGPROBS, None],
    "prompt_logprobs": [0, MAX_LOGPROBS, None],
    "seed": [0, -(2**63), 2**64 - 1, None],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in WRONG.items() for v in values])
def test_a_value_out_of_range_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        SamplingParams(**{field: value})
    assert raised.value.param == field
    assert field in str(raised.value)


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in RIGHT.items() for v in values])
def test_a_value_at_the_end_of_its_range_is_taken(field: str, value: Any) -> None:
    SamplingParams(**{field: value})


def test_every_field_is_tried() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields - set(WRONG) <= {"ignore_eos", "structured_outputs"}
    assert set(WRONG) == set(RIGHT)


def test_lists_become_tuples_and_one_stop_string_a_list_of_one() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[4, 5], allowed_token_ids=[1])  # type: ignore[arg-type]
    assert params.stop == ("END",)
    assert params.stop_token_ids == (4, 5)
    assert params.allowed_token_ids == (1,)


def test_an_answer_cannot_be_longer_than_its_end() -> None:
    with pytest.raises(InvalidRequest) as raised:
        SamplingParams(min_tokens=6, max_tokens=5)
    assert raised.value.param == "min_tokens"
    SamplingParams(min_tokens=5, max_tokens=5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop_token_ids", [320]),
        ("stop_token_ids", [-1]),
        ("logit_bias", {320: 1.0}),
        ("logit_bias", {"5": 1.0}),
        ("allowed_token_ids", [5, 320]),
        ("allowed_token_ids", [True]),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match="319") as raised:
        SamplingParams(**{field: value}).check_ids(320)
    assert raised.value.param == field
    SamplingParams(stop_token_ids=(319,), logit_bias={0: 1.0}, allowed_token_ids=(0, 319)).check_ids(320)


# ---- GenerationDefaults

OFFICIAL = {
    "bos_token_id": 2,
    "pad_token_id": 0,
    "eos_token_id": [1, 106, 50],
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 64,
    "top_p": 0.95,
    "transformers_version": "5.23.0",
}


def test_official_defaults() -> None:
    got = GenerationDefaults.parse(OFFICIAL, (1, 106))
    assert got == GenerationDefaults(temperature=1.0, top_k=64, top_p=0.95, eos=(1, 106, 50))
    twelve = GenerationDefaults.parse(OFFICIAL | {"suppress_tokens": [258883, 258882]}, (1,))
    assert twelve.suppressed == (258883, 258882)


@pytest.mark.parametrize("config", [None, {}, {"do_sample": False, "temperature": 0.7, "top_k": 5}])
def test_without_do_sample_an_answer_is_greedy(config: dict[str, Any] | None) -> None:
    got = GenerationDefaults.parse(config, (1, 106))
    assert got == GenerationDefaults(temperature=0.0, top_k=0, top_p=1.0, eos=(1, 106))


def test_what_a_file_leaves_out_is_transformers_default() -> None:
    want = GenerationDefaults(temperature=1.0, top_k=50, top_p=1.0, eos=(7,))
    assert GenerationDefaults.parse({"do_sample": True, "eos_token_id": 7}, (1,)) == want
    empty = dict.fromkeys(("temperature", "top_k", "top_p", "suppress_tokens", "eos_token_id"))
    assert GenerationDefaults.parse({"do_sample": True} | empty, (7,)) == want


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": "hot"},
        {"top_k": 2.5},
        {"top_p": 1.5},
        {"eos_token_id": "1"},
        {"eos_token_id": [1, None]},
        {"eos_token_id": -1},
        {"eos_token_id": True},
        {"eos_token_id": {"a": 1}},
        {"suppress_tokens": 5},
        {"suppress_tokens": "12"},
        {"suppress_tokens": [1.0]},
        {"suppress_tokens": [-5]},
    ],
    ids=str,
)
def test_bad_files_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        GenerationDefaults.parse(OFFICIAL | wrong, (1,))


def test_a_request_wins_over_the_checkpoint() -> None:
    defaults = GenerationDefaults.parse(OFFICIAL, (1,))
    filled = defaults.fill(SamplingParams())
    assert (filled.temperature, filled.top_k, filled.top_p) == (1.0, 64, 0.95)
    filled = defaults.fill(SamplingParams(temperature=0.0, top_k=0, top_p=0.5, seed=4))
    assert (filled.temperature, filled.top_k, filled.top_p, filled.seed) == (0.0, 0, 0.5, 4)
    # lower than a quotient of logits can bear: the likeliest is certain
    assert defaults.fill(SamplingParams(temperature=1e-40)).temperature == 0.0
    assert defaults.fill(SamplingParams(temperature=1e-30)).temperature == 1e-30


# ---- the runner


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("moe")
    return folder, rig.save(folder, "moe")


@pytest.fixture(scope="module")
def loaded(checkpoint: tuple[Path, Any]) -> rig.Rig:
    return rig.Rig(checkpoint[0])


@pytest.fixture
def runner(loaded: rig.Rig) -> Iterator[rig.Rig]:
    yield loaded
    loaded.release_all()


PROMPT = rig.ask("<bos><|turn>user\nTell me something that I do not know.<turn|>\n<|turn>model\n")
OTHER = rig.ask("<bos>once upon a time")
WARM = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, max_tokens=100)


def answer(runner: rig.Rig, params: SamplingParams, count: int, slot: int = 0, **seat: Any) -> list[int]:
    """Sample `count` tokens after PROMPT, alone in the batch."""
    runner.prefill(slot, PROMPT, params, **seat)
    for _ in range(count - 1):
        runner.decode(slot)
    tokens = runner.tokens(slot)[len(PROMPT.ids) :]
    runner.release(slot)
    assert len(tokens) == count
    return tokens


def greedy(**fields: Any) -> SamplingParams:
    return dataclasses.replace(rig.GREEDY, **fields)


def test_suppressed_ids_never_come(runner: rig.Rig) -> None:
    free = answer(runner, rig.GREEDY, 8)
    banned = tuple(free)
    assert not set(answer(runner, rig.GREEDY, 8, suppressed=banned)) & set(banned)
    # not even if the request wants them, and lists may name ids beyond the vocabulary
    biased = greedy(logit_bias={free[0]: 100.0})
    assert free[0] not in answer(runner, biased, 8, suppressed=(*banned, 258_883))
    hot = dataclasses.replace(WARM, temperature=50.0)
    most = tuple(range(5, 320))
    assert set(answer(runner, hot, 30, suppressed=most)) <= set(range(5))


def test_logit_bias_is_added(runner: rig.Rig) -> None:
    logits = runner.prefill(0, PROMPT)[-1]
    first, second = logits.topk(2).indices.tolist()
    gap = (logits[first] - logits[second]).item()
    runner.release(0)
    assert answer(runner, greedy(logit_bias={second: gap * 0.99}), 1) == [first]
    assert answer(runner, greedy(logit_bias={second: gap * 1.01}), 1) == [second]
    assert answer(runner, greedy(logit_bias={77: 100.0}), 3) == [77] * 3
    assert answer(runner, greedy(logit_bias={first: -100.0}), 1) == [second]


def test_only_allowed_ids_come(runner: rig.Rig) -> None:
    hot = dataclasses.replace(WARM, temperature=50.0, allowed_token_ids=(5, 100, 319))
    assert set(answer(runner, hot, 30)) == {5, 100, 319}
    logits = runner.prefill(0, PROMPT)[-1]
    runner.release(0)
    best = max((5, 100, 319), key=lambda i: logits[i].item())
    assert answer(runner, greedy(allowed_token_ids=(5, 100, 319)), 1) == [best]


def test_nothing_ends_an_answer_before_min_tokens(runner: rig.Rig) -> None:
    free = answer(runner, rig.GREEDY, 1)[0]
    # the tokens that would end it are the only ones wanted, and come as soon as they may
    wanted = greedy(min_tokens=4, logit_bias={free: 50.0, 9: 45.0})
    got = answer(runner, wanted, 6, stop_ids=(free, 258_882))
    assert got == [9] * 4 + [free] * 2


def test_a_row_that_may_take_nothing_fails_alone(runner: rig.Rig) -> None:
    params = (greedy(allowed_token_ids=(3,), min_tokens=1), rig.GREEDY)
    seats = [runner.seat(slot, PROMPT, p, stop_ids=(3,))[0] for slot, p in enumerate(params)]
    result = runner.step([runner.row(0), runner.row(1)], seats)
    assert set(result.errors) == {0}
    assert "bans" in result.errors[0]
    alone = result.tokens[1]
    runner.release_all()
    assert answer(runner, rig.GREEDY, 1) == [alone]


def test_grammar_masks_admit_what_their_bits_say(runner: rig.Rig) -> None:
    mask = np.zeros(10, dtype=np.int32)
    for token in (0, 31, 33, 319):
        mask[token // 32] |= np.int32(np.uint32(1 << token % 32).view(np.int32))
    hot = dataclasses.replace(WARM, temperature=50.0)
    seats = [runner.seat(slot, PROMPT, hot, seed=slot)[0] for slot in range(3)]
    result = runner.step([runner.row(slot) for slot in range(3)], seats, masks={0: mask, 2: mask})
    found = {slot: {token} for slot, token in result.tokens.items()}
    for _ in range(25):
        rows = [runner.row(slot, decode=True) for slot in range(3)]
        for slot, token in runner.step(rows, masks={0: mask, 2: mask}).tokens.items():
            found[slot].add(token)
    assert found[0] | found[2] == {0, 31, 33, 319}
    assert len(found[1]) > 15


def penalize(
    logits: torch.Tensor, prompt: list[int], made: list[int], params: SamplingParams
) -> torch.Tensor:
    """vLLM's order: repetition over prompt and answer, then frequency and presence over the answer."""
    out = logits.double().clone()
    for token in range(len(out)):
        if token in prompt or token in made:
            factor = params.repetition_penalty
            out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
        times = made.count(token)
        out[token] -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
    return out


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -0.5},
        {"presence_penalty": 1.5},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2},
    ],
    ids=str,
)
def test_penalties_are_those_of_a_plain_implementation(runner: rig.Rig, fields: dict[str, float]) -> None:
    params = greedy(logit_bias={50: 3.0, 51: 2.6}, **fields)  # two ids that want to repeat
    bias = torch.zeros(320, dtype=torch.float64)
    bias[[50, 51]] = torch.tensor([3.0, 2.6], dtype=torch.float64)
    logits, made, changed = runner.prefill(0, PROMPT, params)[-1], [], 0
    for _ in range(25):
        got = runner.tokens(0)[-1]
        want = penalize(logits, list(PROMPT.ids), made, params) + bias
        assert want.max() - want[got] < 1e-5
        changed += got != int((logits + bias).argmax())
        made.append(got)
        logits = runner.decode(0)
    assert changed > 0


def test_penalties_know_what_was_made_before_a_preemption(runner: rig.Rig) -> None:
    params = greedy(frequency_penalty=0.7, repetition_penalty=1.2, logit_bias={50: 6.0, 51: 5.5})
    whole = answer(runner, params, 14)
    runner.prefill(1, PROMPT, params)
    for _ in range(6):
        runner.decode(1)
    ids = tuple(runner.tokens(1))
    runner.release(1)
    # back in another slot, with the tokens that it has: they are no part of the prompt
    seat, _ = runner.seat(2, rig.Asked(ids), params)
    runner.step([runner.row(2)], [dataclasses.replace(seat, num_prompt=len(PROMPT.ids))])
    for _ in range(6):
        runner.decode(2)
    assert runner.tokens(2)[len(PROMPT.ids) :] == whole


def test_a_seed_draws_the_same_in_every_batch(runner: rig.Rig) -> None:
    alone = answer(runner, WARM, 12, seed=5)
    assert answer(runner, WARM, 12, slot=2, seed=5) == alone
    assert answer(runner, WARM, 12, seed=6) != alone
    # with others before and behind it, of other settings, coming and going
    runner.prefill(0, OTHER, rig.GREEDY)
    penalized = greedy(repetition_penalty=1.5)
    seats = [runner.seat(1, PROMPT, WARM, seed=5)[0], runner.seat(3, OTHER, penalized)[0]]
    runner.step([runner.row(0, decode=True), runner.row(3), runner.row(1)], seats)
    for i in range(11):
        if i == 4:
            runner.release(0)
        slots = (3, 1) if i >= 4 else (0, 1, 3)
        runner.step([runner.row(slot, decode=True) for slot in slots])
    assert runner.tokens(1)[len(PROMPT.ids) :] == alone


def test_each_token_is_drawn_by_the_number_of_its_place(runner: rig.Rig) -> None:
    logits = runner.prefill(0, PROMPT, WARM, seed=5)[-1]
    for index in range(15):
        ends = logits.double().softmax(-1).cumsum(0)  # in the order of ids
        assert runner.tokens(0)[-1] == int(torch.searchsorted(ends, uniform(5, index), right=True))
        logits = runner.decode(0)


def test_a_sequence_goes_on_with_its_own_random_numbers_after_preemption(runner: rig.Rig) -> None:
    whole = answer(runner, WARM, 10, seed=11)
    ids = (*PROMPT.ids, *whole[:4])
    seat, _ = runner.seat(1, rig.Asked(ids), WARM, seed=11)
    runner.step([runner.row(1)], [dataclasses.replace(seat, num_prompt=len(PROMPT.ids))])
    for _ in range(5):
        runner.decode(1)
    assert runner.tokens(1)[len(PROMPT.ids) :] == whole


def check_entry(entry: TokenLogprobs, token: int, want: torch.Tensor, k: int) -> None:
    """`want`: transformers' log_softmax at the token's place."""
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(want[token].item(), abs=2e-4)
    above = (want > want[token] + 4e-4).sum().item()
    assert above < entry.rank <= 1 + (want > want[token] - 4e-4).sum().item()
    assert len(entry.top) == k
    values, ids = want.topk(k + 1)
    for (top_id, logprob), best in zip(entry.top, values[:k].tolist(), strict=True):
        assert logprob == pytest.approx(best, abs=2e-4)
        assert want[top_id].item() == pytest.approx(best, abs=4e-4)
    assert [logprob for _, logprob in entry.top] == sorted((x for _, x in entry.top), reverse=True)
    assert len({top_id for top_id, _ in entry.top}) == k
    assert ids.numel() == k + 1


def test_logprobs_are_of_the_models_own_distribution(checkpoint: tuple[Path, Any], runner: rig.Rig) -> None:
    """Whatever temperature, penalties, biases and bans do to the choice."""
    params = dataclasses.replace(
        WARM, temperature=3.0, top_k=40, logprobs=5, repetition_penalty=1.4, logit_bias={60: 3.0}
    )
    few = dataclasses.replace(WARM, logprobs=0)
    none = dataclasses.replace(WARM, temperature=2.0)
    # a placeholder that is generated reads as <pad> in transformers, as itself in gemcut
    media = tuple(tiny.SPECIAL_IDS[token] for token in ("<|image|>", "<|video|>", "<|audio|>"))
    seats = [
        runner.seat(i, PROMPT, p, seed=i, suppressed=media)[0] for i, p in enumerate((params, few, none))
    ]
    results = [runner.step([runner.row(i) for i in range(3)], seats)]
    results += [runner.step([runner.row(i, decode=True) for i in range(3)]) for _ in range(9)]
    for slot, k in ((0, 5), (1, 0)):
        ids = runner.tokens(slot)
        wanted = rig.reference_logits(checkpoint[1], rig.Asked(tuple(ids[:-1]))).log_softmax(-1)
        for i, result in enumerate(results):
            place = len(PROMPT.ids) + i
            check_entry(result.logprobs[slot], ids[place], wanted[place - 1], k)
    assert all(2 not in result.logprobs for result in results)


@pytest.mark.parametrize("cuts", [(), (1, 20, len(PROMPT.ids) - 1)], ids=["whole", "in chunks"])
def test_prompt_logprobs(checkpoint: tuple[Path, Any], runner: rig.Rig, cuts: tuple[int, ...]) -> None:
    params = dataclasses.replace(WARM, prompt_logprobs=3)
    wanted = rig.reference_logits(checkpoint[1], PROMPT).log_softmax(-1)
    seat, _ = runner.seat(0, PROMPT, params)
    other, _ = runner.seat(1, OTHER, WARM)
    entries: list[TokenLogprobs] = []
    for i, stop in enumerate((*cuts, len(PROMPT.ids))):
        start = (0, *cuts)[i]
        rows = [runner.row(0, stop - start)]
        if i == 0:
            rows.insert(0, runner.row(1))  # another row before it, which asks for none
        result = runner.step(rows, [seat, other] if i == 0 else [])
        entries += result.prompt_logprobs.get(0, ())
        assert 1 not in result.prompt_logprobs
    assert len(entries) == len(PROMPT.ids) - 1  # the first token has none
    for place, entry in enumerate(entries, start=1):
        check_entry(entry, PROMPT.ids[place], wanted[place - 1], 3)
    assert 0 not in runner.step([runner.row(0, decode=True)]).prompt_logprobs


def test_defaults_of_a_folder_reach_the_sampler(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    """suppress_tokens of generation_config.json, through the engine."""
    from gemcut.llm import LLM

    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint[0].iterdir():
        (folder / file.name).symlink_to(file)
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_bytes": 1 << 20}
    ask = {"prompt_token_ids": list(PROMPT.ids)}
    params = SamplingParams(max_tokens=6, ignore_eos=True)

    def tokens() -> tuple[int, ...]:
        llm = LLM(str(folder), **settings)
        return llm.generate(ask, params, use_tqdm=False)[0].outputs[0].token_ids

    (folder / "generation_config.json").unlink()
    free = tokens()
    assert free == tokens()  # greedy without the file
    config = {"do_sample": False, "eos_token_id": 1, "suppress_tokens": [free[0], free[1]]}
    (folder / "generation_config.json").write_text(json.dumps(config))
    assert not set(tokens()) & set(free[:2])
    assert ModelFiles.open(folder).defaults.eos == (1,)
