"""What a model's code can serve is found out before any time is spent."""

from __future__ import annotations

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.forward import SHARED_PREFIX, hidden_states
from onstream.pipeline.models.packing import pack, share_prompts
from onstream.pipeline.models.prompt_sharing import prepare
from tests.models.exactness import scoring_gap
from tests.models.families import tiny_model as tiny_family
from tests.tiny import Family, sequences, tiny_model

SHAPE: dict[str, int | None] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_full_attention_is_switched_to_shared_prompts(family: Family) -> None:
    model = tiny_model(family)
    assert prepare(model) is None
    assert model.config._attn_implementation == SHARED_PREFIX


def test_a_sliding_window_takes_padded_rows_which_respect_it() -> None:
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)).eval()
    assert prepare(model) == "its layers see 4 tokens back"
    prompts, completions = sequences(2, 3, prompt=(9, 12), seed=2)
    (packed,) = pack(share_prompts(prompts, completions), 1000)
    with torch.no_grad():
        states = hidden_states(model, packed).split(packed.lengths)
        ids = torch.cat((torch.from_numpy(prompts[0]), torch.from_numpy(completions[0])))[None]
        alone = model.model(input_ids=ids, use_cache=False).last_hidden_state[
            0, len(prompts[0]) - 1 : -1
        ]
    torch.testing.assert_close(states[0], alone, rtol=0, atol=1e-5)


def test_code_that_does_not_hand_the_layout_on_takes_padded_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    plain = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda layout=None, **rest: plain(**rest))
    assert "takes no attention function" in (prepare(model) or "")
    assert model.config._attn_implementation == "sdpa"


def test_code_that_computes_something_else_with_a_layout_takes_padded_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    plain = model.model.forward

    def without_positions(position_ids: object = None, **rest: object) -> object:
        return plain(**rest)

    monkeypatch.setattr(model.model, "forward", without_positions)
    assert "would differ by up to" in (prepare(model) or "")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    ],
)
def test_scaled_and_capped_logits_are_exact(family: str, changes: dict[str, float]) -> None:
    assert scoring_gap(tiny_family(family, **changes)) < 1e-4


def test_more_than_a_linear_layer_after_the_last_hidden_states_is_refused() -> None:
    with pytest.raises(UserError, match="are not a projection of its hidden states"):
        prepare(tiny_family("modernbert-decoder"))
