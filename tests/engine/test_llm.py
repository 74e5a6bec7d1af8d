"""LLM as its callers see it: prompts of every form, several answers, ends of answers, logprobs, settings."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from gemcut.errors import ConfigError, InvalidRequest, NotFound
from gemcut.llm import LLM
from gemcut.outputs import Delta, RequestOutput
from gemcut.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(device="cpu", kv_bytes=8 << 20, max_model_len=512)


def say(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def generate(llm: LLM, prompts: object, params: object = GREEDY) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]


def forced(llm: LLM, text: str, **choices: object) -> RequestOutput:
    """An answer that says `text`, token by token, whatever the model thinks: the stops see real tokens."""
    ids = llm.files.tokenizer.encode_raw(text).token_ids[1:]
    prompt = llm.files.chat_prompt(say("x"))
    engine = llm._engine
    draw = engine.runner.sampler.draw

    def scripted(logits, maxima, draws, tensors, masks):
        sampled = draw(logits, maxima, draws, tensors, masks)
        for row, index in enumerate(draws.indices):
            sampled.tokens[row] = ids[min(index, len(ids) - 1)]
        return sampled

    engine.runner.sampler.draw = scripted
    try:
        params = SamplingParams(temperature=0, max_tokens=len(ids), ignore_eos=True, **choices)  # type: ignore[arg-type]
        return llm._run([prompt], params, chat=False, use_tqdm=False)[0]
    finally:
        engine.runner.sampler.draw = draw


# ---- prompts


def test_generate_takes_texts_ids_and_mappings(llm: LLM) -> None:
    text = "The quick"
    ids = list(llm.files.tokenizer.encode_raw(text).token_ids)
    assert ids[0] == llm.files.plan.ids.bos
    forms = [text, ids, tuple(ids), {"prompt": text}, {"prompt_token_ids": ids}]
    alone = [generate(llm, form)[0] for form in forms]
    together = generate(llm, forms)
    assert len({output.request_id for output in [*alone, *together]}) == 10
    for output in [*alone, *together]:
        assert list(output.prompt_token_ids) == ids
        assert output.outputs[0].token_ids == alone[0].outputs[0].token_ids
        assert len(output.outputs[0].token_ids) == 8
    assert generate(llm, []) == []


@pytest.mark.parametrize(
    "prompt", [{}, {"prompt": "a", "more": 1}, {"text": "a"}, [0, -1], [0, 512], [0, True], [[]]]
)
def test_prompts_that_are_none(llm: LLM, prompt: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        generate(llm, prompt)
    assert refused.value.param == "prompt"
    assert llm._engine.idle


def test_one_of_many_refused_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="context"):
        generate(llm, ["fine", "x y z " * 1000, "fine too"])
    stats = llm.stats()
    assert llm._engine.idle
    assert (stats.running, stats.waiting, stats.full_pages[2], stats.sliding_pages[2]) == (0, 0, 0, 0)
    with pytest.raises(InvalidRequest, match="2 prompts and 3 SamplingParams"):
        generate(llm, ["a", "b"], [GREEDY] * 3)


def test_chat_takes_one_conversation_or_several(llm: LLM) -> None:
    questions = [
        say("Repeat: ABC"),
        say("What is 3 + 4?"),
        [*say("Hi"), {"role": "assistant", "content": "Ho"}, *say("?")],
    ]
    alone = [llm.chat(q, GREEDY, use_tqdm=False) for q in questions]
    assert [len(outputs) for outputs in alone] == [1, 1, 1]
    together = llm.chat(questions, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in together] == [o[0].outputs[0].token_ids for o in alone]
    own = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 2, 3)]
    assert [o.usage.completion_tokens for o in llm.chat(questions, own, use_tqdm=False)] == [1, 2, 3]


def test_chat_takes_pictures_in_every_form(llm: LLM, tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    data = io.BytesIO()
    image.save(data, "PNG")
    (tmp_path / "a.png").write_bytes(data.getvalue())
    answers = set()
    for form in (image, pixels, data.getvalue(), str(tmp_path / "a.png"), tmp_path / "a.png"):
        content = [{"type": "image", "image": form}, {"type": "text", "text": "What is it?"}]
        output = llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)[0]
        assert output.usage.image_tokens > 0
        answers.add((output.prompt_token_ids, output.outputs[0].token_ids))
    assert len(answers) == 1
    assert llm.stats().encoder_misses == 1


def test_a_stream_is_the_answer_in_pieces(llm: LLM) -> None:
    prompt = llm.files.chat_prompt(say("List all shapes."))
    news = list(llm.stream(prompt, GREEDY))
    deltas = [n for n in news if isinstance(n, Delta)]
    assert isinstance(news[-1], RequestOutput)
    assert "".join(d.text for d in deltas) == news[-1].outputs[0].text
    stream = llm.stream(prompt, SamplingParams(max_tokens=300, ignore_eos=True))
    next(stream)
    stream.close()
    assert llm._engine.idle


# ---- several answers


def test_several_answers_have_seeds_of_their_own(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=4.0, seed=11, max_tokens=6, ignore_eos=True, logprobs=0)
    output = generate(llm, "Once upon", params)[0]
    assert [answer.index for answer in output.outputs] == [0, 1, 2, 3]
    assert len({answer.token_ids for answer in output.outputs}) == 4
    assert output.usage.completion_tokens == 24
    again = generate(llm, ["Something else", "Once upon"], params)[1]
    assert [a.token_ids for a in again.outputs] == [a.token_ids for a in output.outputs]
    one = generate(llm, "Once upon", SamplingParams(temperature=4.0, seed=11, max_tokens=6, ignore_eos=True))[
        0
    ]
    assert one.outputs[0].token_ids == output.outputs[0].token_ids
    greedy = generate(llm, "Once upon", SamplingParams(n=3, temperature=0, max_tokens=6))[0]
    assert len({answer.token_ids for answer in greedy.outputs}) == 1


def test_the_engines_seed_decides_where_a_request_brings_none() -> None:
    params = SamplingParams(temperature=1.5, max_tokens=6, ignore_eos=True)
    answers = []
    for seed in (3, 3, 4):
        llm = LLM(device="cpu", kv_bytes=4 << 20, max_model_len=128, seed=seed)
        answers.append([o.outputs[0].token_ids for o in generate(llm, ["Once upon", "Once upon"], params)])
    assert answers[0] == answers[1] != answers[2]
    assert answers[0][0] != answers[0][1]


# ---- ends of answers


def test_stop_strings_across_tokens_are_cut_off(llm: LLM) -> None:
    text = "Alpha beta, gamma delta. Épsilon ζήτα 漢字 end"
    whole = forced(llm, text).outputs[0]
    assert whole.text == text
    assert whole.finish_reason == "length"
    for stop in ("ta, ga", "a", "gamma delta", ". É", "ψ", "ζή", "漢字", "字 e", "end", "Alpha"):
        answer = forced(llm, text, stop=(stop, "never here")).outputs[0]
        if stop in text:
            assert (answer.text, answer.finish_reason) == (text[: text.index(stop)], "stop")
            assert len(answer.token_ids) <= len(whole.token_ids)
        else:
            assert (answer.text, answer.finish_reason) == (text, "length")


def test_the_stop_string_that_ends_first_wins(llm: LLM) -> None:
    text = "one two three four five"
    assert forced(llm, text, stop=("four", "two three")).outputs[0].text == "one "
    assert forced(llm, text, stop=("two three four", "three")).outputs[0].text == "one two "
    # the beginning of a stop string that never comes is no part of it
    assert forced(llm, text, stop=("five six",)).outputs[0].text == text


def test_a_stopped_answer_takes_no_more_tokens_and_leaves_no_rows(llm: LLM) -> None:
    text = "one two three four five six seven eight nine ten"
    steps = llm.stats().steps
    answer = forced(llm, text, stop=("two",)).outputs[0]
    assert llm.stats().steps - steps <= len(answer.token_ids) + 1
    assert llm.stats().running == 0


def test_stop_ids_eos_and_min_tokens(llm: LLM) -> None:
    free = llm.chat(say("Repeat: ABC"), SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)[
        0
    ].outputs[0]
    assert free.finish_reason == "stop"
    assert free.token_ids[-1] in llm.files.defaults.eos  # the one that ended it included
    length = len(free.token_ids)

    def chat(**choices: object):
        params = SamplingParams(temperature=0, **choices)  # type: ignore[arg-type]
        return llm.chat(say("Repeat: ABC"), params, use_tqdm=False)[0].outputs[0]

    ignoring = chat(max_tokens=length + 5, ignore_eos=True)
    assert ignoring.token_ids[:length] == free.token_ids
    assert (len(ignoring.token_ids), ignoring.finish_reason) == (length + 5, "length")
    later = chat(max_tokens=length + 9, min_tokens=length + 3)
    assert later.token_ids[: length - 1] == free.token_ids[:-1]
    assert len(later.token_ids) >= length + 3
    assert not set(later.token_ids[: length + 3]) & set(llm.files.defaults.eos)
    first = free.token_ids[0]
    stopped = chat(max_tokens=9, stop_token_ids=[first])
    assert (stopped.token_ids, stopped.finish_reason) == ((first,), "stop")
    assert first not in chat(max_tokens=9, min_tokens=9, stop_token_ids=[first]).token_ids
    assert chat(max_tokens=3, allowed_token_ids=[first], ignore_eos=True).token_ids == (first,) * 3
    assert first not in chat(max_tokens=3, logit_bias={first: -100}).token_ids


def test_without_max_tokens_the_context_is_the_limit() -> None:
    llm = LLM(device="cpu", kv_bytes=4 << 20, max_model_len=64)
    output = generate(llm, "a b c", SamplingParams(temperature=0, ignore_eos=True))[0]
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 64
    assert output.outputs[0].finish_reason == "length"


# ---- logprobs


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    output = generate(llm, "The red square is", params)[0]
    answer = output.outputs[0]
    assert answer.logprobs is not None
    assert [entry.token_id for entry in answer.logprobs] == list(answer.token_ids)
    for entry in answer.logprobs:
        assert (entry.rank, len(entry.top)) == (1, 3)
        assert entry.top[0] == (entry.token_id, entry.logprob)
        assert entry.top[0][1] >= entry.top[1][1] >= entry.top[2][1]
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None
    for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert entry is not None
        assert entry.token_id == token
        assert len(entry.top) == 2
        assert entry.logprob <= entry.top[0][1]
    # the answer read as a prompt has the same
    whole = [*output.prompt_token_ids, *answer.token_ids]
    read = generate(llm, whole, SamplingParams(max_tokens=1, prompt_logprobs=3))[0].prompt_logprobs
    assert read is not None
    for mine, again in zip(answer.logprobs, read[-5:], strict=True):
        assert again is not None
        assert mine.logprob == pytest.approx(again.logprob, abs=1e-4)
        assert [t for t, _ in mine.top] == [t for t, _ in again.top]
    # temperature, penalties and bias change the choice, not what is told of the model
    odd = SamplingParams(
        temperature=0.0, max_tokens=1, logprobs=20, logit_bias={answer.token_ids[0]: -100}, presence_penalty=1
    )
    entry = generate(llm, "The red square is", odd)[0].outputs[0].logprobs
    assert entry is not None
    assert entry[0].rank == 2
    assert len(entry[0].top) == 20
    assert entry[0].top[0] == pytest.approx(answer.logprobs[0].top[0], abs=1e-4)


def test_no_logprobs_unless_asked(llm: LLM) -> None:
    output = generate(llm, "a")[0]
    assert output.prompt_logprobs is None
    assert output.outputs[0].logprobs is None
    none_of_top = generate(llm, "a", SamplingParams(max_tokens=2, ignore_eos=True, logprobs=0))[0].outputs[0]
    assert none_of_top.logprobs is not None
    assert [entry.top for entry in none_of_top.logprobs] == [(), ()]


def test_prompt_logprobs_come_whole_in_chunks_beside_others_and_with_several_answers() -> None:
    text = "One two three four five six seven eight nine ten. " * 4
    params = SamplingParams(n=2, temperature=0, max_tokens=2, prompt_logprobs=1)
    outputs = []
    for tokens in (512, 16):
        llm = LLM(
            device="cpu", kv_bytes=8 << 20, max_model_len=512, max_num_batched_tokens=tokens, max_num_seqs=8
        )
        generate(llm, text, SamplingParams(max_tokens=1))  # cached, but every position is read anew
        outputs.append(generate(llm, [text, "other", text], [params, GREEDY, params]))
    for one, other in zip(*outputs, strict=True):
        if one.prompt_logprobs is None:
            assert other.prompt_logprobs is None
            continue
        assert other.prompt_logprobs is not None
        for mine, theirs in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert mine is not None
            assert theirs is not None
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


# ---- usage, bar, settings


def test_usage_and_timings(llm: LLM) -> None:
    prompt = list(range(30, 80))
    first, second = (generate(llm, prompt)[0] for _ in range(2))
    assert (first.usage.prompt_tokens, first.usage.completion_tokens, first.usage.image_tokens) == (50, 8, 0)
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 48)
    assert 0 < first.timings.first_token_s <= first.timings.total_s
    assert first.timings.tokens_per_s > 0


def test_the_bar_is_silent_in_a_pipe() -> None:
    code = (
        "from gemcut.llm import LLM; from gemcut.sampling import SamplingParams as P\n"
        "llm = LLM(device='cpu', kv_bytes=1 << 22, max_model_len=64)\n"
        "print(len(llm.generate(['a', 'b'], P(max_tokens=2))))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("2\n", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "no device"),
        ({"device": "meta"}, "cpu and cuda"),
        ({"dtype": "int8"}, "int8"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_batched_tokens": 4, "max_num_seqs": 8}, "decode row for every sequence"),
        ({"kv_bytes": 10}, "hold no page"),
        ({"kv_bytes": -1}, "kv_bytes"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"page_size": 0}, "page_size"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
    ],
)
def test_settings_that_cannot_be_honoured(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(**({"device": "cpu"} | settings))


def test_unknown_settings_and_models() -> None:
    with pytest.raises(TypeError, match="no_such_setting"):
        LLM(no_such_setting=1)
    with pytest.raises(NotFound):
        LLM("/no/such/folder")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="Use --device cpu"):
            LLM(device="cuda")
