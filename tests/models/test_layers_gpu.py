"""On a GPU: a layer of 26B-A4B at full size errs no more than transformers' own, in bf16 against fp32."""

from __future__ import annotations

import gc
import json
from importlib.resources import files
from typing import Any

import pytest
import torch
import transformers

from gemcut.kernels import Backend, rope_table
from gemcut.kernels.add_norm.op import rms_norm
from gemcut.models.batch import Batch, LayerKV, PagedRows
from gemcut.models.checkpoint import allocate
from gemcut.models.gemma4.model import Gemma4
from gemcut.nn.rope import text_inv_freq
from gemcut.plan import parse_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
T = 1500  # longer than the window
PAGE = 64
VOCAB = 512


def config(kind: str) -> dict[str, Any]:
    """The text config of 26B-A4B with two layers, the first of this kind, and few words."""
    size = json.loads((files("gemcut.plan") / "sizes" / "26B-A4B.json").read_text())["text_config"]
    layers = {"num_hidden_layers": 2, "layer_types": [f"{kind}_attention", "full_attention"]}
    return size | layers | {"vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB}


def reference(text: dict[str, Any], dtype: torch.dtype, state: dict[str, torch.Tensor] | None = None) -> Any:
    """transformers' model on the GPU: random, or with the values of `state`."""
    kwargs = {key: value for key, value in text.items() if key not in ("model_type", "dtype")}
    with torch.device("cuda"):
        made: Any = transformers.Gemma4ForCausalLM._from_config(
            transformers.Gemma4TextConfig(**kwargs), attn_implementation="sdpa", dtype=torch.float32
        )
    if state is None:
        with torch.device("cuda"), torch.no_grad():
            generator = torch.Generator("cuda").manual_seed(0)
            for value in made.parameters():
                noise = torch.randn(value.shape, generator=generator, device="cuda")
                vector = value.dim() < 2
                value.copy_((1.0 + 0.2 * noise if vector else 0.03 * noise).bfloat16())
    else:
        made.load_state_dict(state)
    frequencies = {name: value.clone() for name, value in made.named_buffers() if "inv_freq" in name}
    made = made.to(dtype).eval()
    for name, value in made.named_buffers():
        if name in frequencies:
            value.data = frequencies[name]
    made.set_experts_implementation("grouped_mm" if dtype == torch.bfloat16 else "eager")
    return made


@torch.no_grad()
def first_layer(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Output [T, H] of the first layer on these embeddings."""
    caught: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        caught.append((output[0] if isinstance(output, tuple) else output).squeeze(0))

    hook = model.model.layers[0].register_forward_hook(keep)
    model.model(inputs_embeds=x[None], use_cache=False)
    hook.remove()
    return caught[0]


@torch.inference_mode()
def ours(
    text: dict[str, Any], state: dict[str, torch.Tensor], x: torch.Tensor, backend: Backend
) -> torch.Tensor:
    """The same from gemcut's layer with the values of `state`."""
    device = x.device
    plan = parse_config({"model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"], **text})
    with torch.device("meta"):
        model = Gemma4(plan, backend)
    for name, values in allocate(model, plan, device=device, dtype=x.dtype).items():
        values.copy_(state[name])
    layer: Any = model.language_model.layers[0]
    spec = plan.text.layers[0]
    positions = torch.arange(T, device=device)
    rope = rope_table(positions, text_inv_freq(spec.rope, device), x.dtype, backend=backend)
    pages = -(-T // PAGE)
    shape = pages, PAGE, spec.kv_heads, spec.head_dim
    kv = LayerKV(*(torch.full(shape, float("nan"), dtype=x.dtype, device=device) for _ in range(2)))
    table = torch.randperm(pages, device=device).int()[None]
    rows = PagedRows(table[0].long()[positions // PAGE] * PAGE + positions % PAGE, table)
    ends = (torch.tensor(values, dtype=torch.int32, device=device) for values in ([0, T], [T]))
    batch = Batch(positions, positions, *ends, sliding=rows, full=rows)
    h = rms_norm(x, layer.input_layernorm.weight, plan.text.eps)
    return layer(x, h, model.language_model.norm, rope, rows, kv, batch)[0]


@pytest.mark.parametrize("kind", ["sliding", "full"])
def test_a_layer_errs_no_more_than_transformers(kind: str) -> None:
    text = config(kind)
    x = torch.randn(T, text["hidden_size"], generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    x = x.bfloat16()
    exact = reference(text, torch.float32)
    state = {name: value.bfloat16() for name, value in exact.state_dict().items()}
    truth = first_layer(exact, x.float())
    del exact
    gc.collect()
    half = reference(text, torch.bfloat16, state)
    theirs = first_layer(half, x)
    del half
    errors = {"transformers": (theirs.float() - truth).norm() / truth.norm()}
    for numerics in ("reference", "fused"):
        out = ours(text, state, x, Backend("triton", numerics))
        errors[f"gemcut, {numerics} numerics"] = (out.float() - truth).norm() / truth.norm()
        gc.collect()
    torch.cuda.empty_cache()
    report = ", ".join(f"{name} {error:.5f}" for name, error in errors.items())
    print(f"{kind} layer, error against fp32: {report}")
    theirs_err = errors.pop("transformers")
    # both see each near-tie of the router from another side: a token in a hundred may fall either way
    assert max(errors.values()) <= 1.02 * theirs_err, report
    assert theirs_err < 0.1, report
