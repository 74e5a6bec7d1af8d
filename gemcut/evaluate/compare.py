"""Two settings of an engine on the same questions: the check behind "accuracy unchanged".

Enters: a model, a task's items and two settings. Leaves: where the answers part and how close the decision
was, the scores and their difference, and how far the distributions of the next token are apart.

The engines run one after the other. Each answers all questions greedily in one batch. Then each reads the
questions with the first one's answers behind them, so that both judge the same text: these distributions
come from prefills, those of the answers from decode steps. An engine names at most 20 tokens a position;
see `statistics.distance` for what is made of them.
"""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

import torch

from gemcut.config import EngineConfig
from gemcut.data import Prompt, TokenLogprobs
from gemcut.engine.model_files import ChatPrompt, ModelFiles
from gemcut.evaluate.answerers import reply_of
from gemcut.evaluate.statistics import Distance, Estimate, distance, percentile
from gemcut.evaluate.task import Item, Reply, Task
from gemcut.llm import LLM, open_files
from gemcut.media.workers import MediaWorkers
from gemcut.outputs import CompletionOutput, RequestOutput
from gemcut.sampling import MAX_LOGPROBS, SamplingParams

QUESTIONS = "in the questions"
ANSWERS_READ = "in the answers, read at once"
ANSWERS_WRITTEN = "in the answers, token by token"
THREADS = 8  # that wait for pictures to be decoded
Result = TypeVar("Result")
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What two engines that compute the same may differ by.

    near_tie: nats between the two likeliest tokens, up to which either may come. mean_kl: nats, over all
    positions of the answers. errors: standard errors of the scores' difference. farther: how many times
    farther from the reference the second side's distributions may be than the first's; `unseen` nats are
    always allowed. It holds for sides of one dtype.
    """

    near_tie: float = 0.5
    mean_kl: float = 0.002
    errors: float = 3.0
    farther: float = 3.0
    unseen: float = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One engine: what it ran with, how its forwards went, its score, and errors of requests that failed,
    each with its number."""

    name: str
    used: Mapping[str, Any]
    forwards: Mapping[str, Any]
    score: Estimate
    errors: Mapping[str, int]
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """Two answers that are not the same.

    at: index of the first token that differs. tokens: what each side chose there, "" where an answer had
    ended. margin: nats by which the first side preferred its likeliest token to the next one; None if it
    chose none. reference_margin: nats by which the reference prefers the first side's token to the second
    side's; None without one, or if it does not list both.
    """

    id: str
    question: str
    answers: tuple[str, str]
    points: tuple[float, float]
    at: int
    tokens: tuple[str, str]
    margin: float | None
    reference_margin: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """The distances between the sides over positions of a kind, in nats. same: share of positions with the
    same likeliest token. listed: mean probability that the distances know by token."""

    where: str
    positions: int
    mean: float
    p99: float
    most: float
    same: float
    listed: float

    @classmethod
    def of(cls, where: str, distances: Sequence[Distance]) -> Divergence:
        kls, count = [each.kl for each in distances], len(distances)
        return cls(
            where=where,
            positions=count,
            mean=math.fsum(kls) / count,
            p99=percentile(kls, 0.99),
            most=max(kls),
            same=sum(each.same for each in distances) / count,
            listed=math.fsum(each.listed for each in distances) / count,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """difference: of the scores, second less first, item by item. reference: the settings of the judge;
    from_reference: how far each side's distributions are from its own, where the text is read at once.
    findings: where a limit is exceeded, in sentences."""

    task: str
    model: str | None
    items: int
    sides: tuple[Side, Side]
    agreeing: int
    difference: Estimate
    partings: list[Parting]
    divergences: list[Divergence]
    reference: Mapping[str, Any] | None
    from_reference: tuple[list[Divergence], list[Divergence]] | None
    findings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Account:
    """What an engine said: its answers, and the distributions in the forced texts by position."""

    used: Mapping[str, Any]
    forwards: Mapping[str, Any]
    answers: list[CompletionOutput]
    forced: list[Sequence[TokenLogprobs | None]]
    errors: Mapping[str, int]
    wall_s: float


def compare(
    task: Task,
    items: Sequence[Item],
    base: EngineConfig,
    settings: tuple[Mapping[str, Any], Mapping[str, Any]],
    names: tuple[str, str],
    *,
    max_tokens: int | None = None,
    reference: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    tell: Tell = lambda line: None,
) -> Comparison:
    """Run both sides. settings: what each changes in `base`. max_tokens: of an answer, by default the task's.
    reference: what a third engine changes, which judges where answers part, and is the yardstick of both
    sides' distributions. Raises ConfigError if an engine cannot start."""
    assert items, "there is nothing to compare without items"
    configs = [replace(base, **changes) for changes in settings]
    longest = task.max_tokens if max_tokens is None else max_tokens
    files = open_files(base)
    tell(f"{len(items)} questions are read")
    prompts = chat_prompts(files, items)
    tell(f"{names[0]} answers")
    first = _with_engine(configs[0], files, lambda llm: _account(llm, prompts, longest, None))
    forced = [answer.token_ids for answer in first.answers]
    tell(f"{names[1]} answers")
    second = _with_engine(configs[1], files, lambda llm: _account(llm, prompts, longest, forced))
    where = [_parting(a.token_ids, b.token_ids) for a, b in zip(first.answers, second.answers, strict=True)]
    margins: dict[int, float | None] = {}
    from_reference = None
    if reference is not None:
        tell("the reference reads the same")
        config = replace(base, **reference)
        margins, judged = _with_engine(
            config,
            files,
            lambda llm: (_judge(llm, prompts, first, second, where), _read(llm, prompts, forced)),
        )
        accounts = [output.prompt_logprobs or () for output in judged]
        from_reference = (
            _while_reading(prompts, accounts, first.forced),
            _while_reading(prompts, accounts, second.forced),
        )
    replies = [[reply_of(answer) for answer in account.answers] for account in (first, second)]
    points = [
        [task.mark(item, reply).points for item, reply in zip(items, side, strict=True)] for side in replies
    ]
    draws = [item.draw for item in items]
    partings = [
        Parting(
            id=items[i].id,
            question=items[i].question,
            answers=(_shown(replies[0][i]), _shown(replies[1][i])),
            points=(points[0][i], points[1][i]),
            at=at,
            tokens=(_token(files, first.answers[i], at), _token(files, second.answers[i], at)),
            margin=_margin(first.answers[i], at),
            reference_margin=margins.get(i),
        )
        for i, at in enumerate(where)
        if at is not None
    ]
    result = Comparison(
        task=task.name,
        model=base.model,
        items=len(items),
        sides=(_side(names[0], first, points[0], draws), _side(names[1], second, points[1], draws)),
        agreeing=len(items) - len(partings),
        difference=Estimate.of([b - a for a, b in zip(*points, strict=True)], draws),
        partings=partings,
        divergences=[
            *_while_reading(prompts, first.forced, second.forced),
            *_while_writing(first, second, where),
        ],
        reference=reference,
        from_reference=from_reference,
    )
    return replace(result, findings=findings(result, limits or Limits()))


def findings(result: Comparison, limits: Limits) -> list[str]:
    """What is more than rounding; empty if the sides may be taken for the same."""
    found = [
        f"{side.name}: {count} requests failed: {error}"
        for side in result.sides
        for error, count in side.errors.items()
    ]
    sure = [p.margin for p in result.partings if p.margin is not None and not p.margin <= limits.near_tie]
    if sure:
        found.append(
            f"{len(sure)} of {result.items} answers part where the first side was sure, by up to "
            f"{max(sure):.2f} nats; a near-tie is {limits.near_tie:g} at most."
        )
    change, error = result.difference.mean, result.difference.error
    if abs(change) > limits.errors * error:
        found.append(
            f"The score changes by {change:+.2%}, by more than {limits.errors:g} standard errors "
            f"of {error:.2%}."
        )
    # of questions nothing is asked: a model need not be sure of them, and small models are not
    found += [
        f"The distributions {each.where} are {each.mean:.3g} nats apart on average; "
        f"the limit is {limits.mean_kl:g}."
        for each in result.divergences
        if each.where != QUESTIONS and not each.mean <= limits.mean_kl
    ]
    # a coarser dtype is farther by intention
    same_dtype = result.sides[0].used["dtype"] == result.sides[1].used["dtype"]
    found += [
        f"From the reference, the second side's distributions {other.where} are {other.mean:.3g} nats away, "
        f"the first side's {one.mean:.3g}."
        for one, other in zip(*(result.from_reference or ((), ())), strict=False)
        if same_dtype and not other.mean <= limits.farther * one.mean + limits.unseen
    ]
    return found


def chat_prompts(files: ModelFiles, items: Sequence[Item]) -> list[ChatPrompt]:
    """Render all items; pictures are decoded in worker processes, side by side."""
    with MediaWorkers() as workers, ThreadPoolExecutor(THREADS) as threads:

        def render(item: Item) -> ChatPrompt:
            return files.chat_prompt(item.messages, enable_thinking=item.thinking, load_media=workers.load)

        return list(threads.map(render, items))


def _with_engine(config: EngineConfig, files: ModelFiles, use: Callable[[LLM], Result]) -> Result:
    """Use an engine, then give its memory back for the next one."""
    llm = LLM(files=files, **{each.name: getattr(config, each.name) for each in fields(config)})
    result = use(llm)
    del llm
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def _account(
    llm: LLM, prompts: Sequence[ChatPrompt], max_tokens: int, forced: Sequence[Sequence[int]] | None
) -> _Account:
    """Answer all prompts, then read them with the answers of `forced` behind them, by default one's own."""
    began = time.perf_counter()
    written = llm.chat(prompts, SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=MAX_LOGPROBS))
    answers = [output.outputs[0] for output in written]
    read = _read(llm, prompts, [answer.token_ids for answer in answers] if forced is None else forced)
    stats = llm.stats()
    return _Account(
        used=asdict(llm.used),
        forwards={
            "replays": dict(stats.graph_replays),
            "eager": dict(stats.eager_forwards),
            "dropped": dict(stats.dropped_graphs),
        },
        answers=answers,
        forced=[output.prompt_logprobs or () for output in read],
        errors=Counter(a.error for a in (*answers, *(o.outputs[0] for o in read)) if a.error is not None),
        wall_s=time.perf_counter() - began,
    )


def _read(llm: LLM, prompts: Sequence[ChatPrompt], texts: Sequence[Sequence[int]]) -> list[RequestOutput]:
    """Read all prompts with a text behind each, and account for every position."""
    longer = [_continued(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=MAX_LOGPROBS)
    return llm.chat(longer, params, use_tqdm=False)


def _judge(
    llm: LLM,
    prompts: Sequence[ChatPrompt],
    first: _Account,
    second: _Account,
    where: Sequence[int | None],
) -> dict[int, float | None]:
    """By item whose answers part: by how much this engine prefers the first side's token."""
    parted = {
        i: at
        for i, at in enumerate(where)
        if at is not None and at < min(len(side.answers[i].token_ids) for side in (first, second))
    }
    texts = [_continued(prompts[i], first.answers[i].token_ids[:at]) for i, at in parted.items()]
    outputs = llm.chat(
        texts, SamplingParams(temperature=0.0, max_tokens=1, logprobs=MAX_LOGPROBS), use_tqdm=False
    )
    margins: dict[int, float | None] = {}
    for (i, at), output in zip(parted.items(), outputs, strict=True):
        listed = dict(output.outputs[0].logprobs[0].top) if output.outputs[0].logprobs else {}
        chosen = [side.answers[i].token_ids[at] for side in (first, second)]
        margins[i] = listed[chosen[0]] - listed[chosen[1]] if listed.keys() >= set(chosen) else None
    return margins


def _continued(prompt: ChatPrompt, token_ids: Sequence[int]) -> ChatPrompt:
    """The prompt with ids behind it, as if they had been answered already."""
    return replace(prompt, prompt=Prompt((*prompt.prompt.token_ids, *token_ids), prompt.prompt.spans))


def _parting(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Index of the first token that is not the same, or where the shorter one ends; None if they agree."""
    if first == second:
        return None
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _while_reading(
    prompts: Sequence[ChatPrompt],
    first: Sequence[Sequence[TokenLogprobs | None]],
    second: Sequence[Sequence[TokenLogprobs | None]],
) -> list[Divergence]:
    """In questions and answers. What stands at a picture's soft tokens is never predicted, and left out."""
    found: dict[str, list[Distance]] = {QUESTIONS: [], ANSWERS_READ: []}
    for prompt, one, other in zip(prompts, first, second, strict=True):
        length, pictures = len(prompt.prompt), _soft_positions(prompt)
        for position, (a, b) in enumerate(zip(one, other, strict=False)):
            if a is not None and b is not None and position not in pictures:
                found[QUESTIONS if position < length else ANSWERS_READ].append(distance(a, b))
    return [Divergence.of(where, distances) for where, distances in found.items() if distances]


def _while_writing(first: _Account, second: _Account, where: Sequence[int | None]) -> list[Divergence]:
    """In the answers, up to the token at which they part: so far both have written the same."""
    distances: list[Distance] = []
    for one, other, at in zip(first.answers, second.answers, where, strict=True):
        upto = None if at is None else at + 1
        both = [(answer.logprobs or ())[:upto] for answer in (one, other)]
        distances += [distance(a, b) for a, b in zip(*both, strict=False)]
    return [Divergence.of(ANSWERS_WRITTEN, distances)] if distances else []


def _soft_positions(prompt: ChatPrompt) -> set[int]:
    return {position for span in prompt.prompt.spans for position in range(span.start, span.stop)}


def _side(name: str, account: _Account, points: Sequence[float], draws: Sequence[str]) -> Side:
    return Side(
        name=name,
        used=account.used,
        forwards=account.forwards,
        score=Estimate.of(points, draws),
        errors=account.errors,
        wall_s=account.wall_s,
    )


def _margin(answer: CompletionOutput, at: int) -> float | None:
    """Nats between the two likeliest tokens at a place of an answer."""
    if answer.logprobs is None or at >= len(answer.logprobs):
        return None
    (_, best), (_, next_best) = answer.logprobs[at].top[:2]
    return best - next_best


def _token(files: ModelFiles, answer: CompletionOutput, at: int) -> str:
    return files.tokenizer.decode(answer.token_ids[at : at + 1])


def _shown(reply: Reply) -> str:
    return f"({reply.reasoning}) {reply.text}" if reply.reasoning else reply.text
