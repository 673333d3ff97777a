"""Attention by cumulative lengths reads what today's calls under masks read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.forward import SHARED_PREFIX, VARLEN, hidden_states, varlen_layout_of
from onstream.pipeline.models.loading import load_model, set_text_attention, text_config
from onstream.pipeline.models.packing import Ids, SharedPrefixRow, pack, share_prompts
from onstream.pipeline.models.prompt_sharing import choose_attention, prepare
from onstream.pipeline.models.varlen import varlen_attention
from onstream.settings.sections.trainer import TrainerSettings
from onstream.workers.trainer.learner import Learner
from tests.models.families import VOCABULARY, tiny_model
from tests.models.test_gradients import KINDS, a_batch, gradient_of_a_step, written

CLOSE = 1e-6
"""Of a difference, by its L2 norm, relative to what it differs from."""
PROMPTS = (1, 5, 300)
"""Tokens. The last is beyond what is read as one row under a mask."""
COMPLETIONS = (1, 2, 9, 40)


def sequences(start: int) -> tuple[list[Ids], list[Ids]]:
    """Groups of unlike completions, and one sequence alone. All begin with `start` tokens."""
    random = np.random.default_rng(7)
    prompts = []
    completions = []
    for length in PROMPTS:
        prompt = random.integers(3, VOCABULARY, length)
        for tokens in COMPLETIONS:
            prompts.append(prompt)
            completions.append(random.integers(3, VOCABULARY, tokens))
    prompts.append(random.integers(3, VOCABULARY, 17))
    completions.append(random.integers(3, VOCABULARY, 8))
    common = random.integers(3, VOCABULARY, start)
    return [np.concatenate((common, prompt)) for prompt in prompts], completions


def rows(max_tokens: int, start: int = 0) -> list[SharedPrefixRow]:
    return pack(share_prompts(*sequences(start)), max_tokens, share_start=True)


def test_the_arrays_of_a_prompt_with_two_completions() -> None:
    (row,) = pack(share_prompts([[5, 6], [5, 6]], [[7, 8, 9], [4]]), 64)
    lengths = row.cumulative
    assert lengths.keys.tolist() == [0, 1, 0, 1, 2, 3]
    assert lengths.query_ends.tolist() == [0, 2, 4]
    assert lengths.key_ends.tolist() == [0, 2, 6]
    assert (lengths.longest_query, lengths.longest_key) == (2, 4)


@pytest.mark.parametrize(
    ("max_tokens", "start"), [(64, 0), (400, 0), (4096, 0), (400, 50), (4096, 50)]
)
def test_each_token_sees_by_cumulative_lengths_what_it_sees_in_the_calls(
    max_tokens: int, start: int
) -> None:
    packed = rows(max_tokens, start)
    assert any(row.start == start for row in packed)
    for row in packed:
        assert seen_by_lengths(row) == seen_in_calls(row)


def seen_by_lengths(row: SharedPrefixRow) -> dict[int, set[int]]:
    """The places that each token's query sees, by the rule in `CumulativeLengths`."""
    lengths = row.cumulative
    seen = {}
    for at in range(len(lengths.query_ends) - 1):
        start, end = lengths.query_ends[at : at + 2]
        keys = lengths.keys[lengths.key_ends[at] : lengths.key_ends[at + 1]]
        for query in range(start, end):
            seen[query] = set(keys[: len(keys) - (end - 1 - query)].tolist())
    return seen


def seen_in_calls(row: SharedPrefixRow) -> dict[int, set[int]]:
    """The same by today's calls, without what padding sees."""
    outputs: list[set[int]] = []
    for call in row.calls:
        for at, keys in enumerate(call.keys):
            width = call.queries.shape[1]
            mask = np.tri(width, dtype=bool) if call.mask is None else None
            if call.mask is not None:
                mask = call.mask[min(at, len(call.mask) - 1)]
            assert mask is not None
            outputs += [set(keys[mask[query]].tolist()) for query in range(width)]
    return {place: outputs[int(output)] for place, output in enumerate(row.output_index)}


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe", "granite"])
@pytest.mark.parametrize(("max_tokens", "start"), [(64, 0), (4096, 0), (4096, 50)])
def test_hidden_states_and_gradients_are_those_of_the_calls(
    family: str, max_tokens: int, start: int
) -> None:
    model = tiny_model(family)
    assert prepare(model) is None
    packed = rows(max_tokens, start)
    expected = states_and_gradient(model, packed)
    set_text_attention(model, VARLEN)
    found = states_and_gradient(model, packed)
    gaps = [
        float((one - other).norm() / other.norm())
        for one, other in zip(found, expected, strict=True)
    ]
    print(f"{family}: states {gaps[0]:.1e}, gradient {gaps[1]:.1e}")
    assert max(gaps) < CLOSE


def states_and_gradient(
    model: PreTrainedModel, packed: list[SharedPrefixRow]
) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    found = []
    for row in packed:
        states = hidden_states(model, row)
        (states * torch.linspace(-1, 1, states.shape[-1])).sum().backward()
        found.append(states.detach())
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return torch.cat(found), torch.cat(gradients)


def test_no_mask_is_made_for_cumulative_lengths() -> None:
    model = tiny_model("qwen3")
    choose_attention(model, "varlen", torch.float32, prepare(model))
    (row,) = rows(4096)
    hidden_states(model, row)
    assert "cumulative" in vars(row)
    assert "calls" not in vars(row)


def test_a_layer_whose_attention_is_more_is_refused() -> None:
    (row,) = pack(share_prompts([[5, 6]], [[7, 8]]), 64)
    layout = varlen_layout_of(row, torch.device("cpu"))
    states = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="sliding_window"):
        varlen_attention(
            torch.nn.Identity(), states, states, states, None, layout=layout, sliding_window=4
        )


@pytest.mark.parametrize(
    ("asked", "chosen"), [("auto", SHARED_PREFIX), ("sdpa", SHARED_PREFIX), ("varlen", VARLEN)]
)
def test_on_a_cpu_rows_are_read_by_cumulative_lengths_only_where_that_is_asked_for(
    tmp_path: Path, asked: str, chosen: str
) -> None:
    learner = learner_with(written(tmp_path, *KINDS["packed"]), asked)
    assert learner.padded_because is None
    assert text_config(learner.model)._attn_implementation == chosen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_by_cumulative_lengths_has_the_gradient_of_one_under_masks(
    tmp_path: Path, dtype: str
) -> None:
    directory = written(tmp_path, *KINDS["packed"])
    batch = a_batch(load_model(directory, dtype=torch.float32, device=torch.device("cpu")))
    expected = gradient_of_a_step(learner_with(directory, "sdpa", dtype=dtype), batch)
    found = gradient_of_a_step(learner_with(directory, "varlen", dtype=dtype), batch)
    again = gradient_of_a_step(
        learner_with(directory, "varlen", dtype=dtype, recompute=True), batch
    )
    gap = float((found - expected).norm() / expected.norm())
    print(f"{dtype}: {gap:.1e}")
    assert gap < (10 * CLOSE if dtype == "float32" else 0.03)
    assert torch.equal(again, found)


def learner_with(
    directory: Path, attention: str, *, dtype: str = "float32", recompute: bool = False
) -> Learner:
    loss = {"teacher_tau": 0.5, "kl_tau": 0.0}
    settings = TrainerSettings.model_validate(
        {"loss": loss, "microbatch": 100, "attention": attention, "dtype": dtype}
    )
    return Learner(directory, settings, torch.device("cpu"), recompute=recompute)


def test_a_model_on_padded_rows_is_refused_by_name_where_cumulative_lengths_are_asked_for(
    tmp_path: Path,
) -> None:
    directory = written(tmp_path, *KINDS["hybrid"])
    with pytest.raises(UserError, match=r"(?s)trainer\.attention = .varlen.*linear_attention"):
        learner_with(directory, "varlen")
