"""config.json -> ModelPlan: both spellings, hub quirks, and everything else refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import SIZES, config

from gemcut.errors import ConfigError
from gemcut.plan import ModelPlan, kv_bytes, parse_config, tensor_shapes, weight_bytes


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """transformers warns through logging about configs that tests make odd on purpose."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def reference(values: dict[str, Any]) -> Any:
    """The config object of transformers."""
    unified = values["model_type"] == "gemma4_unified"
    return (transformers.Gemma4UnifiedConfig if unified else transformers.Gemma4Config)(
        **copy.deepcopy(values)
    )


def saved(reference_config: Any) -> dict[str, Any]:
    """What transformers would write to config.json."""
    return json.loads(reference_config.to_json_string(use_diff=False))


# --- what a plan says --------------------------------------------------------------------------------

# hidden, layers, ff_width, q_heads, kv_heads sliding / full, window, k_eq_v, max positions (spec 1.1)
TABLE = {
    "E2B": (1536, 35, 6144, 8, 1, 1, 512, False, 131072),
    "E4B": (2560, 42, 10240, 8, 2, 2, 512, False, 131072),
    "12B": (3840, 48, 15360, 16, 8, 1, 1024, True, 262144),
    "26B-A4B": (2816, 30, 2112, 16, 8, 2, 1024, True, 262144),
    "31B": (5376, 60, 21504, 32, 16, 4, 1024, True, 262144),
}


@pytest.mark.parametrize("size", SIZES)
def test_text_facts_are_those_of_the_spec(size: str) -> None:
    plan = parse_config(config(size))
    text = plan.text
    sliding, full = text.layers[0], text.layers[-1]
    assert (sliding.kind, full.kind) == ("sliding", "full")
    facts = (text.hidden, len(text.layers), sliding.ff_width, full.q_heads, sliding.kv_heads, full.kv_heads)
    assert (*facts, text.window, full.k_eq_v, text.max_positions) == TABLE[size]
    period = 5 if size == "E2B" else 6
    assert all((layer.kind == "full") == (layer.index % period == period - 1) for layer in text.layers)
    for layer in text.layers:
        full_layer = layer.kind == "full"
        assert layer.head_dim == layer.rope.head_dim == (512 if full_layer else 256)
        assert layer.window == (None if full_layer else text.window)
        assert layer.k_eq_v == (full_layer and TABLE[size][7])
        assert layer.rope.theta == (1e6 if full_layer else 1e4)
        assert layer.rope.live_angles == (64 if full_layer else 128)
        assert layer.q_heads == full.q_heads
        assert layer.kv_heads == (full if full_layer else sliding).kv_heads
    assert (text.vocab, text.eps, text.softcap) == (262144, 1e-6, 30.0)
    assert text.bidirectional_vision == (size not in ("E2B", "E4B"))
    experts = full.experts
    assert (experts is not None) == (size == "26B-A4B")
    if experts is not None:
        assert (experts.count, experts.top_k, experts.width) == (128, 8, 704)
    assert (text.per_layer_input is not None) == (size in ("E2B", "E4B"))
    assert plan.unknown_keys == ()


# first shared layer, what sliding and full layers read, sliding and full layers with their own KV
SHARING = {"E2B": (15, 13, 14, 12, 3), "E4B": (24, 22, 23, 20, 4)}


@pytest.mark.parametrize("size", SIZES)
def test_kv_sharing_is_that_of_spec_2_3(size: str) -> None:
    text = parse_config(config(size)).text
    first, sliding, full, own_sliding, own_full = SHARING.get(size, (len(text.layers), 0, 0, 0, 0))
    for layer in text.layers:
        assert layer.owns_kv == (layer.index < first)
        if not layer.owns_kv:
            assert layer.kv_layer == (sliding if layer.kind == "sliding" else full)
        wide = size == "E2B" and layer.index >= first
        assert layer.ff_width == text.layers[0].ff_width * (2 if wide else 1)
    if size in SHARING:
        assert (len(text.owners("sliding")), len(text.owners("full"))) == (own_sliding, own_full)


def test_towers_and_token_ids_are_those_of_the_spec() -> None:
    plans = {size: parse_config(config(size)) for size in SIZES}
    for size, plan in plans.items():
        ids = plan.ids
        assert (ids.image, ids.boi, ids.eoi, ids.video) == (258880, 255999, 258882, 258884)
        assert (ids.audio, ids.boa, ids.eoa) == (258881, 256000, 258883)
        assert (ids.pad, ids.bos, ids.eos) == (0, 2, (1, 106))
        assert plan.text_prefix == "model.language_model."
        assert plan.default_image_tokens == 280
        vision, audio = plan.vision, plan.audio
        if size == "12B":
            assert vision is None
            assert plan.patch_embedder is not None
            assert (plan.patch_embedder.patch_values, plan.patch_embedder.positions) == (6912, 1120)
            assert audio is not None
            assert (audio.layers, audio.output) == (0, 640)
            continue
        small = size in ("E2B", "E4B")
        assert vision is not None
        shape = (vision.hidden, vision.ff_width, vision.layers, vision.heads, vision.head_dim)
        assert shape == ((768, 3072, 16, 12, 64) if small else (1152, 4304, 27, 16, 72))
        assert (vision.clipped, vision.standardize) == (small, not small)
        assert (vision.positions, vision.rope_theta, vision.eps) == (10240, 100.0, 1e-6)
        assert (audio is not None) == small
        if audio is not None:
            assert (audio.hidden, audio.layers, audio.heads, audio.ff_width) == (1024, 12, 8, 4096)
            assert (audio.channels, audio.kernel, audio.output) == ((128, 32), 5, 1536)


# --- spellings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_both_spellings_give_one_plan(size: str, tmp_path: Path) -> None:
    """Files written by transformers 5.16 and newer carry per_layer_config (spec 1.1)."""
    reference(config(size)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "global_head_dim" not in written["text_config"]
    assert written["text_config"]["per_layer_config"]
    assert parse_config(written) == parse_config(config(size))
    assert parse_config(saved(reference(config(size)))) == parse_config(config(size))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_tiny_models_parse(kind: str) -> None:
    plan = parse_config(saved(tiny.make_config(kind)))
    assert plan.text.hidden == 48
    assert plan.ids.image == tiny.SPECIAL_IDS["<|image|>"]
    if kind != "unified":
        text_only = parse_config(saved(tiny.make_config(kind, text_only=True)))
        assert text_only.text == plan.text
        assert (text_only.vision, text_only.audio, text_only.text_prefix) == (None, None, "model.")


def _sections(values: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield ()
    for section in ("text_config", "vision_config", "audio_config"):
        if values.get(section):
            yield (section,)


@pytest.mark.parametrize("size", SIZES)
def test_an_absent_key_means_what_it_means_in_transformers(size: str) -> None:
    """Leave out one key at a time: either gemcut asks for it, or both read the same model.

    Token ids apart: transformers fills in the released models' ids, gemcut never guesses one.
    """
    whole = config(size)
    different = []
    for path in _sections(whole):
        for key in whole[path[0]] if path else whole:
            if key in ("model_type", "text_config", "vision_config", "audio_config"):
                continue
            values = copy.deepcopy(whole)
            del (values[path[0]] if path else values)[key]
            try:
                plan = parse_config(values)
            except ConfigError as error:
                if key not in str(error):
                    different.append(f"{key}: {error}")
                continue
            expected = parse_config(saved(reference(values)))
            if dataclasses.replace(plan, ids=expected.ids) != expected:
                different.append(".".join([*path, key]))
    assert different == []


def test_global_kv_heads_count_only_with_k_eq_v() -> None:
    values = config("31B")
    values["text_config"]["attention_k_eq_v"] = False
    assert parse_config(values).text.layers[-1].kv_heads == 16
    values["text_config"]["attention_k_eq_v"] = True
    values["text_config"]["num_global_key_value_heads"] = None
    assert parse_config(values).text.layers[-1].kv_heads == 16


def test_the_last_layer_is_full_whatever_the_list_says() -> None:
    values = config("31B")
    values["text_config"]["layer_types"][-1] = "sliding_attention"
    assert parse_config(values) == parse_config(config("31B"))
    assert parse_config(values) == parse_config(saved(reference(values)))


@pytest.mark.parametrize("quirk", ["default", "axial"])
def test_vision_rope_is_axial_in_both_spellings(quirk: str) -> None:
    values = config("31B")
    values["vision_config"]["rope_parameters"]["rope_type"] = quirk
    assert parse_config(values) == parse_config(config("31B"))


def test_class_defaults_and_restated_values_are_no_unknown_keys() -> None:
    values = config("26B-A4B")
    values |= {"audio_seq_length": 1500, "eoa_token_id": 258883, "id2label": {"0": "LABEL_0"}}
    values["text_config"] |= {"transformers_version": "5.23.0", "use_cache": True, "torch_dtype": "bfloat16"}
    values["vision_config"] |= {"max_position_embeddings": 131072, "default_output_length": 280}
    assert parse_config(values) == parse_config(config("26B-A4B"))


# --- refusals ----------------------------------------------------------------------------------------

UNKNOWN = [
    ("vision_token_pruning", ("vision_token_pruning",)),
    ("text_config.attn_logit_softcapping", ("text_config", "attn_logit_softcapping")),
    ("vision_config.use_head", ("vision_config", "use_head")),
]


@pytest.mark.parametrize(("named", "path"), UNKNOWN)
def test_unknown_keys_are_named_and_let_through_on_request(named: str, path: tuple[str, ...]) -> None:
    values = config("31B")
    at = values
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = 3
    with pytest.raises(ConfigError, match=named.replace(".", r"\.") + ".*--allow-unknown-config"):
        parse_config(values)
    plan = parse_config(values, allow_unknown=True)
    assert plan.unknown_keys == (named,)
    assert plan.text == parse_config(config("31B")).text


def test_unknown_audio_keys_are_named() -> None:
    for size in ("E2B", "12B"):
        values = config(size)
        values["audio_config"]["dilation"] = 2
        with pytest.raises(ConfigError, match=r"audio_config\.dilation"):
            parse_config(values)


WRONG: list[tuple[str, Any, str]] = [
    ("model_type", "gemma3", "model_type is 'gemma3'"),
    ("text_config", None, "text_config is missing"),
    ("text_config", 3, "text_config must be an object"),
    ("text_config.model_type", "llama", r"text_config\.model_type is 'llama'"),
    ("text_config.hidden_size", 0, r"hidden_size must be a whole number of at least 1, got 0"),
    ("text_config.hidden_size", 48.0, r"hidden_size must be a whole number"),
    ("text_config.num_hidden_layers", 10**9, r"num_hidden_layers"),
    ("text_config.num_hidden_layers", 59, r"layer_types lists 60 layers, num_hidden_layers says 59"),
    ("text_config.layer_types", ["linear_attention"] * 60, r"layer_types must list"),
    ("text_config.layer_types", [[]] * 60, r"layer_types must list"),
    ("text_config.layer_types", "full_attention", r"layer_types must list"),
    ("text_config.hidden_activation", "silu", r"hidden_activation is 'silu'"),
    ("text_config.attention_bias", True, r"attention_bias is True"),
    ("text_config.tie_word_embeddings", False, r"tie_word_embeddings is False"),
    ("tie_word_embeddings", False, r"tie_word_embeddings is False"),
    ("text_config.use_bidirectional_attention", "all", r'use_bidirectional_attention is "all"'),
    ("text_config.use_bidirectional_attention", "text", r"use_bidirectional_attention is 'text'"),
    ("text_config.num_key_value_heads", 5, r"Layer 0: 32 query heads cannot share 5 KV heads"),
    ("text_config.head_dim", 255, r"Layer 0: head size 255 is odd"),
    ("text_config.num_kv_shared_layers", 60, r"num_kv_shared_layers is 60"),
    ("text_config.num_kv_shared_layers", 58, r"No layer before 2 provides K and V"),
    ("text_config.rms_norm_eps", -1, r"rms_norm_eps must be a positive number"),
    ("text_config.rms_norm_eps", float("nan"), r"rms_norm_eps must be a positive number"),
    ("text_config.final_logit_softcapping", 0, r"final_logit_softcapping must be a positive number"),
    ("text_config.rope_parameters", [], r"rope_parameters must be an object"),
    ("text_config.rope_parameters.full_attention", 1e6, r"rope_parameters\.full_attention must be an object"),
    ("text_config.rope_parameters.full_attention.rope_type", "yarn", r"rope_type is 'yarn'"),
    ("text_config.rope_parameters.full_attention.factor", 8.0, r"rotary setting .*full_attention\.factor"),
    ("text_config.rope_parameters.sliding_attention.partial_rotary_factor", 0.5, r"cannot be 0\.5"),
    ("text_config.enable_moe_block", 1, r"enable_moe_block must be true or false"),
    ("text_config.enable_moe_block", True, r"num_experts must be a whole number"),
    ("text_config.per_layer_config", {"60": {}}, r"per_layer_config\.60: there are layers 0 to 59"),
    ("text_config.per_layer_config", {"²": {}}, r"per_layer_config"),
    ("text_config.per_layer_config", {"5": {"sliding_window": 4}}, r"per_layer_config\.5\.sliding_window"),
    ("text_config.pad_token_id", 262144, r"Token id pad is 262144, outside the vocabulary"),
    ("eos_token_id", [1, 300000], r"Token id eos\[1\] is 300000"),
    ("eos_token_id", [1, None], r"eos"),
    ("eos_token_id", {"a": 1}, r"eos"),
    ("image_token_id", -1, r"image_token_id must be a token id"),
    ("vision_soft_tokens_per_image", 256, r"vision_soft_tokens_per_image is 256; .*70, 140, 280, 560, 1120"),
    ("vision_config.patch_size", 14, r"vision_config\.patch_size is 14"),
    ("vision_config.head_dim", 70, r"vision_config\.head_dim is 70"),
    ("vision_config.rope_parameters.rope_type", "yarn", r"rope_type is 'yarn'"),
    ("vision_config.num_key_value_heads", 4, r"vision_config\..*num_key_value_heads 4"),
    ("quantization_config", {"quant_method": "compressed-tensors"}, r"quantised \('compressed-tensors'\)"),
    ("quantization_config", "int4", r"quantised"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG, ids=[f"{p}={v!r:.20}" for p, v, _ in WRONG])
def test_wrong_values_are_refused_by_name(path: str, value: Any, message: str) -> None:
    values = config("31B")
    at = values
    *steps, key = path.split(".")
    for step in steps:
        at = at[step]
    at[key] = value
    with pytest.raises(ConfigError, match=message):
        parse_config(values)


AUDIO_WRONG: list[tuple[str, Any]] = [
    ("attention_logit_cap", 30.0),
    ("hidden_act", "gelu"),
    ("subsampling_conv_channels", [128]),
    ("subsampling_conv_channels", [128, "32"]),
    ("num_attention_heads", 7),
]


@pytest.mark.parametrize(("key", "value"), AUDIO_WRONG)
def test_wrong_audio_values_are_refused_by_name(key: str, value: Any) -> None:
    values = config("E2B")
    values["audio_config"][key] = value
    with pytest.raises(ConfigError, match=rf"audio_config\.{key}"):
        parse_config(values)


@pytest.mark.parametrize("values", [None, [], "gemma4", 4])
def test_a_config_is_an_object(values: Any) -> None:
    with pytest.raises(ConfigError, match="JSON object"):
        parse_config(values)


# --- any mutation ------------------------------------------------------------------------------------

ORIGINALS = [config(size) for size in SIZES] + [
    saved(tiny.make_config("ple")),
    saved(tiny.make_config("moe", text_only=True)),
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 600)
    | st.sampled_from([2**31, 10**30, -1])
    | st.floats()
    | st.sampled_from(["", "all", "vision", "gemma4_text", "full_attention", "sliding_attention", "²", "5"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["0", "rope_type", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    steps: Any = ()
    if isinstance(value, dict):
        steps = value.keys()
    elif isinstance(value, list):
        steps = range(min(len(value), 3))
    for step in steps:
        yield (*at, step)
        yield from _paths(value[step], (*at, step))


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.data())
def test_any_mutation_is_a_plan_or_a_config_error(data: st.DataObject) -> None:
    values: Any = copy.deepcopy(data.draw(st.sampled_from(ORIGINALS)))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(_paths(values)) or [("x",)]))
        at = values
        for step in path[:-1]:
            at = at[step]
        action = data.draw(st.sampled_from(["replace", "replace", "delete", "add"]))
        if action == "replace" or not isinstance(at, dict):
            at[path[-1]] = data.draw(JSON)
        elif action == "delete":
            del at[path[-1]]
        else:
            at[data.draw(st.sampled_from(["head_dim", "factor", "num_experts", "per_layer_config"]))] = (
                data.draw(JSON)
            )
    try:
        plan = parse_config(values, allow_unknown=data.draw(st.booleans()))
    except ConfigError:
        return
    assert isinstance(plan, ModelPlan)
    # and such a plan can be asked anything
    assert all(size >= 0 for shape in tensor_shapes(plan).values() for size in shape)
    assert weight_bytes(plan) > 0
    assert kv_bytes(plan.text, 4096) > 0
    assert all(isinstance(token, int) for token in plan.ids.eos)
