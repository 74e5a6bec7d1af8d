"""`sample` against a plain numpy implementation of the same rules, and its draws against their chances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gemcut import kernels
from gemcut.kernels import Backend
from gemcut.runner.sample import uniform

TORCH = Backend()
V = 50


def logits(rows: int, seed: int = 0, vocab: int = V) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2.0


def draw(
    values: torch.Tensor,
    chances: np.ndarray | list[float],
    *,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] | None = None,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
) -> list[int]:
    rows, vocab = values.shape

    def column(value: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype)

    return kernels.sample(
        values,
        kernels.block_maxima(values, backend=TORCH),
        column(temperature, torch.float32),
        column(vocab if top_k is None else top_k, torch.int64),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        torch.from_numpy(np.asarray(chances, dtype=np.float64)),
        backend=TORCH,
    ).tolist()


def distribution(
    row: np.ndarray, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[np.ndarray, np.ndarray]:
    """Ids in falling order of probability, ties by id, and their chances after all filters. fp64."""
    order = np.lexsort((np.arange(len(row)), -row))
    scaled = row[order].astype(np.float64) / temperature
    chances = np.exp(scaled - scaled[0])
    chances[top_k:] = 0.0
    chances /= chances.sum()
    before = np.cumsum(chances) - chances
    kept = (before < top_p) & (chances >= min_p * chances[0])
    chances = np.where(kept, chances, 0.0)
    return order, chances / chances.sum()


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_k": V, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 0.6, "top_k": V, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1.7, "top_k": 7, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1.0, "top_k": V, "top_p": 0.8, "min_p": 0.0},
    {"temperature": 1.0, "top_k": V, "top_p": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "min_p": 0.0},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1.0, "top_k": V, "top_p": 1e-6, "min_p": 0.0},
    {"temperature": 1.0, "top_k": V, "top_p": 1.0, "min_p": 1.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_are_those_of_the_plain_implementation(settings: dict[str, Any]) -> None:
    rows = 200
    values = logits(rows)
    chances = np.random.default_rng(0).random(rows)
    got = draw(values, chances, **settings)
    for row in range(rows):
        order, probabilities = distribution(values[row].numpy(), **settings)
        by_id = np.zeros(V)
        by_id[order] = probabilities
        ends = np.cumsum(by_id)
        want = int(np.searchsorted(ends, chances[row], side="right"))
        # fp32 sums may put a number that lies on a boundary to either side
        assert got[row] == want or np.abs(ends - chances[row]).min() < 1e-5


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_frequencies_are_the_distributions(settings: dict[str, Any]) -> None:
    """Chi-square over 20,000 draws of one row; what is filtered out never comes."""
    draws = 20_000
    values = logits(1, seed=3)
    chances = np.array([uniform(7, index) for index in range(draws)])
    got = np.bincount(draw(values.expand(draws, -1).contiguous(), chances, **settings), minlength=V)
    order, probabilities = distribution(values[0].numpy(), **settings)
    assert not got[order[probabilities == 0]].any()
    expected, found = probabilities * draws, got[order]
    often = expected >= 5
    # the rare ones together, as the test asks for
    expected = np.append(expected[often], expected[~often].sum())
    found = np.append(found[often], found[~often].sum())
    expected, found = expected[expected > 0], found[expected > 0]
    square = ((found - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert square <= freedom + 4 * np.sqrt(2 * freedom)  # a chance of about 1 in 10,000; the seed is fixed


@pytest.mark.parametrize("max_top_k", [0, 20, None])
def test_kernels_give_broken_rows_some_id_and_leave_the_others_alone(max_top_k: int | None) -> None:
    """Rows of NaN, and with all ids banned; without a GPU the kernels are interpreted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, vocab = 4, 300
    values = logits(rows, vocab=vocab).to(device)
    values[1], values[2] = float("nan"), float("-inf")

    def column(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    def tokens(backend: Backend) -> list[int]:
        return kernels.sample(
            values,
            kernels.block_maxima(values, backend=backend),
            column(0.0 if max_top_k == 0 else 0.9, torch.float32),
            column(max_top_k or vocab, torch.int64),
            column(0.9, torch.float32),
            column(0.0, torch.float32),
            column(0.3, torch.float64),
            max_top_k=max_top_k,
            backend=backend,
        ).tolist()

    got, want = tokens(Backend("triton")), tokens(TORCH)
    assert (got[0], got[3]) == (want[0], want[3])
    assert all(0 <= token < vocab for token in got)


def test_random_numbers_are_uniform_and_independent() -> None:
    numbers = np.array([[uniform(seed, index) for index in range(200)] for seed in range(100)])
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # 19 degrees of freedom
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.03
    assert uniform(-1, 0) != uniform(1, 0)


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest_id() -> None:
    values = logits(6)
    values[2] = 1.0
    values[3, [4, 9]] = 50.0
    assert draw(values, [0.99] * 6, temperature=0.0) == values.argmax(dim=-1).tolist()
    mixed = draw(values, [0.99] * 6, temperature=[0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    assert mixed[2:4] == [0, 4]
    assert mixed[0] == values[0].argmax()
    assert draw(values, [0.0] * 6, top_k=1)[2:4] == [0, 4]
    # filters do not touch greedy rows
    assert draw(values, [0.99] * 6, temperature=0.0, top_k=1, top_p=0.1, min_p=1.0)[0] == values[0].argmax()


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-30])
def test_low_temperatures_are_greedy(temperature: float) -> None:
    """Down to the lowest that `GenerationDefaults.fill` lets through: quotients stay finite."""
    values = logits(20, seed=5)
    assert draw(values, np.linspace(0, 0.999, 20), temperature=temperature) == values.argmax(-1).tolist()


def test_equal_logits_keep_the_lowest_ids() -> None:
    values = torch.zeros(100, V)
    got = draw(values, np.linspace(0, 0.999, 100), top_k=3)
    assert set(got) == {0, 1, 2}
    got = draw(values, np.linspace(0, 0.999, 100), top_p=5.5 / V)
    assert set(got) == set(range(6))


def test_top_p_of_one_keeps_the_rarest() -> None:
    """Before it lies a mass that is 1 in fp32."""
    values = torch.tensor([[0.0, -21.0]])
    assert draw(values, [1.0 - 1e-10]) == [1]
    assert draw(values, [1.0 - 1e-10], top_p=0.999) == [0]


def test_the_last_number_draws_the_last_kept_token() -> None:
    values = logits(1, seed=1)
    almost = np.nextafter(1.0, 0.0)
    order, _ = distribution(values[0].numpy(), temperature=1.0, top_k=V, top_p=1.0, min_p=0.0)
    assert draw(values, [almost]) == [V - 1]
    assert draw(values, [0.0]) == [0]
    assert draw(values, [almost], top_k=5) == [max(order[:5])]
    assert draw(values, [0.0], top_k=5) == [min(order[:5])]


def test_ids_at_minus_infinity_never_come() -> None:
    values = logits(100)
    values[:, 7:] = float("-inf")
    got = draw(values, np.linspace(0, np.nextafter(1.0, 0.0), 100), temperature=50.0)
    assert set(got) == set(range(7))


def test_a_row_depends_on_nothing_but_itself() -> None:
    """Other rows, their order, their settings and even their NaN leave its token alone."""
    rows = 12
    values, chances = logits(rows), np.random.default_rng(1).random(rows)
    settings: dict[str, list[Any]] = {
        "temperature": [0.0, 0.7, 1.0, 1.3] * 3,
        "top_k": [V, 5, 10] * 4,
        "top_p": [1.0, 0.9] * 6,
        "min_p": [0.0, 0.0, 0.1, 0.0, 0.02, 0.0] * 2,
    }
    whole = draw(values, chances, **settings)
    for row in range(rows):
        alone = {name: column[row : row + 1] for name, column in settings.items()}
        assert draw(values[row : row + 1], chances[row : row + 1], **alone) == [whole[row]]
    order = np.random.default_rng(2).permutation(rows)
    shuffled = {name: [column[i] for i in order] for name, column in settings.items()}
    assert draw(values[order], chances[order], **shuffled) == [whole[i] for i in order]
    values[5] = float("nan")
    spoiled = draw(values, chances, **settings)
    assert spoiled[:5] + spoiled[6:] == whole[:5] + whole[6:]
    assert 0 <= spoiled[5] < V
