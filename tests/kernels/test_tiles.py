"""The matrix kernels with tiles that no heuristic chooses here, and what deterministic mode promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemcut.kernels import Backend, grouped_glu, grouped_linear, linear, paged_attention, tower_attention
from gemcut.kernels.attention import hopper
from gemcut.kernels.attention import triton as attention
from gemcut.kernels.attention.cases import MIXED, TINY_FULL, TINY_SLIDING, Heads, Row
from gemcut.kernels.attention.cases import case as attention_case
from gemcut.kernels.case import Case
from gemcut.kernels.experts import triton as experts
from gemcut.kernels.experts.cases import case as experts_case
from gemcut.kernels.router.op import Routing
from gemcut.kernels.tower_attention import hopper as tower_hopper
from gemcut.kernels.tower_attention import triton as tower
from gemcut.kernels.tower_attention.cases import case as tower_case
from gemcut.kernels.tuned import enter, tuned

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE, TOLERANCE = (torch.bfloat16, 2e-2) if torch.cuda.is_available() else (torch.float32, 1e-5)
TRITON = Backend("triton")
EXACT = Backend("triton", deterministic=True)


def inputs_of(case: Case) -> dict[str, Any]:
    return case.make_inputs(torch.Generator(DEVICE).manual_seed(1), DEVICE, DTYPE)


def agrees(case: Case) -> None:
    inputs = inputs_of(case)
    (name,) = case.outputs
    want, got = case.run(inputs, Backend())[name], case.run(inputs, TRITON)[name]
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("heads", [Heads(4, 2, 16, 12), Heads(4, 1, 32)], ids=str)
@pytest.mark.parametrize(
    ("config", "page_size"),
    [
        (attention.ChunkConfig(16, 32, 16, 4, 1), 16),  # two pages a step, two programs share a head
        (attention.ChunkConfig(32, 64, 16, 4, 1), 16),
        (attention.ChunkConfig(64, 16, 16, 4, 1, one_loop=True), 64),  # four steps a page
        (attention.ChunkConfig(32, 16, 16, 4, 1, one_loop=True), 4),
    ],
    ids=str,
)
def test_attention_chunks(
    config: attention.ChunkConfig, page_size: int, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "chunk_config", lambda *_: config)
    agrees(attention_case("mixed", heads, *MIXED, page_size=page_size, padding=3))
    rows = Row(30, 120, ((92, 97), (99, 118))), Row(3, 130)
    agrees(attention_case("pictures", heads, *rows, page_size=page_size, spans=True))


@pytest.mark.parametrize("programs", [1, 7, 64])
@pytest.mark.parametrize(("block_n", "page_size"), [(16, 64), (32, 16), (64, 16)])
def test_attention_singles(
    programs: int, block_n: int, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = attention.SingleConfig(block_n, programs, 4, 1)
    monkeypatch.setattr(attention, "single_config", lambda *_: config)
    rows = Row(1, 300), Row(1, 12), Row(0, 0), Row(1, 77)
    for heads in (TINY_SLIDING, TINY_FULL):
        agrees(attention_case("decode", heads, *rows, page_size=page_size, padding=1))


def test_attention_over_pools_that_need_wide_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WIDE_POOL", 0)
    agrees(attention_case("mixed", TINY_SLIDING, *MIXED, padding=3))
    agrees(attention_case("decode", TINY_FULL, Row(1, 70), Row(1, 3)))


def test_attention_by_hand_serves_large_causal_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "is_hopper", lambda _: True)

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, pages, spans = empty(257, 16, 512), empty(3, 64, 2, 512), empty(257, 2, dtype=torch.int32)
    assert hopper.serves(q, pages, None, None)
    assert hopper.serves(q.half(), empty(3, 128, 16, 512), None, None)
    assert not hopper.serves(q[:256], pages, None, None)
    assert not hopper.serves(q, pages, spans, None)
    assert not hopper.serves(q, pages, None, 1024)
    assert not hopper.serves(q, empty(3, 32, 2, 512), None, None)
    assert not hopper.serves(q.float(), pages.float(), None, None)
    assert not hopper.serves(empty(8192, 16, 256), empty(3, 64, 2, 256), None, None)


def test_attention_needs_powers_of_two() -> None:
    for heads, page_size in ((Heads(4, 2, 24), 16), (TINY_FULL, 24)):
        case = attention_case("step", heads, Row(2, 2), page_size=page_size)
        with pytest.raises(ValueError, match=r"paged_attention: .* got \d+ and \d+$"):
            case.run(inputs_of(case), TRITON)


def test_attention_reads_lengths_on_the_device() -> None:
    """What a replayed graph sees: the same shapes, other numbers."""
    case = attention_case("step", TINY_SLIDING, Row(5, 50), Row(1, 40), Row(4, 4), padding=4)
    inputs = inputs_of(case)
    other = attention_case("step", TINY_SLIDING, Row(1, 33), Row(8, 50), Row(5, 5), padding=0)
    fresh = inputs_of(other)
    fresh["page_table"] = torch.nn.functional.pad(fresh["page_table"], (0, 8), value=-1)
    want = other.run(fresh, Backend())["o"]
    assert fresh["q"].shape == inputs["q"].shape
    torch.testing.assert_close(other.run(fresh, TRITON)["o"], want, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    "config",
    [
        experts.Config(32, 64, 32, 4, 2, thin=True),  # 40 columns: a strip of 32 and a narrow one
        experts.Config(32, 64, 64, 4, 2),
        experts.Config(16, 128, 16, 4, 2),
        experts.Config(64, 32, 32, 4, 3, thin=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("glu", [True, False])
def test_experts(config: experts.Config, glu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "find_config", lambda *_: config)
    agrees(experts_case(70, glu=glu, padding=2))
    agrees(experts_case(33, glu=glu, experts=3, top_k=1, hidden=80, width=72))
    agrees(experts_case(2, glu=glu, hidden=32, width=16))


@pytest.mark.parametrize(
    "config", [tower.Config(16, 16, 4, 1), tower.Config(64, 32, 4, 2), tower.Config(32, 128, 4, 1)], ids=str
)
def test_tower(config: tower.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower, "find_config", lambda _: config)
    agrees(tower_case(36, 0, 71, 9, heads=1, head=72))
    agrees(tower_case(30, 1, head=16))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter does not know Hopper's instructions")
@pytest.mark.parametrize(
    "config",
    [tower_hopper.Config(2, 64, 4), tower_hopper.Config(3, 128, 4), tower_hopper.Config(4, 64, 2)],
    ids=str,
)
def test_tower_on_hopper(config: tower_hopper.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    if not tower_hopper.serves(torch.empty(1, 2, 72, dtype=DTYPE, device=DEVICE)):
        pytest.skip("not a Hopper GPU")
    monkeypatch.setattr(tower, "find_config", lambda _: config)
    agrees(tower_case(36, 0, 71, 9, 700, 128, 193, head=72))


@pytest.mark.parametrize("head", [16, 72])
def test_a_picture_gets_the_same_bits_alone(head: int) -> None:
    inputs = inputs_of(tower_case(9, 75, 30, head=head))
    among = tower_attention(**inputs, backend=TRITON)[9:84]
    alone = {name: inputs[name][9:84].contiguous() for name in "qkv"}
    starts = torch.tensor([0, 75], dtype=torch.int32, device=DEVICE)
    assert torch.equal(tower_attention(**alone, starts=starts, backend=TRITON), among)


@pytest.mark.parametrize("head", [16, 72])
def test_tower_patches_of_no_picture_are_zero(head: int) -> None:
    inputs = inputs_of(tower_case(9, 36, head=head))
    for name in "qkv":
        inputs[name][40:] = float("nan")
    inputs["starts"][-1] = 40
    out = tower_attention(**inputs, backend=TRITON)
    assert not out.isnan().any()
    assert (out[40:] == 0).all()


# -- deterministic mode: a row's bits depend on its own tokens alone --


@pytest.mark.parametrize("heads", [Heads(4, 2, 16, 12), Heads(4, 1, 32)], ids=str)
def test_deterministic_attention(heads: Heads) -> None:
    """A prompt at once, in chunks, token by token, and among others: the same bits."""
    inputs = inputs_of(attention_case("prompt", heads, Row(75, 75), padding=3))
    q, table = inputs["q"], inputs["page_table"]

    def attend(first: int, last: int, *, others: int = 0) -> torch.Tensor:
        """Queries first .. last - 1, behind `others` rows that read the same keys."""
        starts = [*range(others + 1), others + last - first]
        lengths = [*range(40, 40 + others), last]
        given = {
            **inputs,
            "q": torch.cat([q[40 : 40 + others], q[first:last]]),
            "page_table": table.expand(others + 1, -1).contiguous(),
            "query_start": torch.tensor(starts, dtype=torch.int32, device=DEVICE),
            "seq_lens": torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        }
        return paged_attention(**given, backend=EXACT)[others:]

    # the case makes pages below the last query's window unreadable; none are: the prompt is one chunk
    whole = attend(0, 75)
    assert torch.equal(torch.cat([attend(0, 31), attend(31, 32), attend(32, 75)]), whole)
    assert torch.equal(attend(20, 75, others=5), whole[20:])
    for token in (0, 17, 63, 64, 74):
        assert torch.equal(attend(token, token + 1, others=token % 3), whole[token : token + 1])


def test_deterministic_products() -> None:
    generator = torch.Generator(DEVICE).manual_seed(2)
    x = torch.randn(70, 100, generator=generator, device=DEVICE).to(DTYPE)
    weight = torch.randn(132, 100, generator=generator, device=DEVICE).to(DTYPE)
    whole = linear(x, weight, backend=EXACT)
    for start, stop in ((0, 1), (3, 40), (69, 70)):
        assert torch.equal(linear(x[start:stop].contiguous(), weight, backend=EXACT), whole[start:stop])


def test_deterministic_experts() -> None:
    first = inputs_of(experts_case(70, glu=True))
    second = inputs_of(experts_case(70, glu=False))
    routing = first["routing"]

    def run(start: int, stop: int) -> torch.Tensor:
        chosen = routing.experts[start:stop]
        flat = chosen.flatten()
        counts = torch.bincount(flat, minlength=8)
        part = Routing(
            routing.weights[start:stop].contiguous(),
            chosen.contiguous(),
            flat.argsort(stable=True),
            torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        )
        m = grouped_glu(first["h"][start:stop].contiguous(), first["gate_up"], part, backend=EXACT)
        return grouped_linear(m, second["down"], part, backend=EXACT)

    whole = run(0, 70)
    for start, stop in ((0, 1), (3, 40), (69, 70)):
        assert torch.equal(run(start, stop), whole[start:stop])


# -- tuned tables --


def test_the_next_larger_measured_size_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "no such card")
    device = torch.device("cuda", 0)
    assert tuned(__file__, "key", 1, device) is None
    for size in (8, 64):
        enter(__file__, "key", size, "no such card", {"warps": size})
    assert [tuned(__file__, "key", size, device) for size in (1, 8, 9, 999)] == [
        {"warps": 8},
        {"warps": 8},
        {"warps": 64},
        {"warps": 64},
    ]
    assert tuned(__file__, "key", 8, torch.device("cpu")) is None
