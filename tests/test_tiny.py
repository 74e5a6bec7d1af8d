"""The recipe of spec 9 gives the models that the spec describes."""

import pytest
import tiny
import torch

PARAMETERS = {"dense": 272_048, "moe": 441_440, "ple": 533_796, "unified": 544_640}
LARGEST_LOGIT = {"dense": 2.2908, "moe": 2.2155, "ple": 2.4000, "unified": 2.5410}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_recipe_is_the_specs(kind: str) -> None:
    model = tiny.make_model(kind)
    inputs = tiny.image_inputs(kind, tiny.picture(), tiny.PROMPT)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[kind]
    assert inputs["mm_token_type_ids"].sum() == 60
    assert logits.shape == (1, 87, tiny.VOCAB)
    # Tokens and logits depend on torch's random numbers; torch 2.11 to 2.13 draw the same.
    assert logits.abs().max().item() == pytest.approx(LARGEST_LOGIT[kind], abs=1e-3)


def test_the_tokenizer_round_trips_any_text() -> None:
    tokenizer = tiny.make_tokenizer()
    text = "<|turn>user\nnaïve ▁ 漢字 🙂\r\n<turn|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == tiny.SPECIAL_IDS["<|turn>"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tiny.SPECIAL_IDS["<|image|>"]) == "<|image|>"
