"""What others report for the same tasks. Only scores of one harness and one form of the question compare."""

from __future__ import annotations

from dataclasses import dataclass

GOOGLE = "Google's report, instruction-tuned"
SGLANG = "SGLang's harness, H200"
TRANSFORMERS = "transformers 5.23, fp32, exact answers to 4,258 questions (--items 4258)"


@dataclass(frozen=True, slots=True)
class Baseline:
    """score: 0 to 1."""

    model: str
    score: float
    source: str


_SIZES = ("31B", "26B-A4B", "12B", "E4B", "E2B")
_GOOGLE: dict[str, tuple[float | None, ...]] = {
    "mmlu_pro": (0.852, 0.826, 0.772, 0.694, 0.600),
    "gpqa": (0.843, 0.823, 0.788, 0.586, 0.434),
    "mmmu_pro": (0.769, 0.738, 0.691, None, None),
    "mathvision": (0.856, 0.824, None, None, None),
}
_SGLANG: dict[str, tuple[float | None, ...]] = {"mmmu": (0.589, 0.549, 0.683, 0.396, 0.307)}


def baselines(task: str) -> list[Baseline]:
    """Reported scores of a task, the largest model first; empty if none is known."""
    if task == "demo":
        return [Baseline("demo", 4247 / 4258, TRANSFORMERS)]
    return [
        Baseline(size, score, source)
        for table, source in ((_GOOGLE, GOOGLE), (_SGLANG, SGLANG))
        for size, score in zip(_SIZES, table.get(task, ()), strict=False)
        if score is not None
    ]
