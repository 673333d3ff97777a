"""Rows padded on the right, a sequence each: for models whose attention cannot share prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from onstream.pipeline.models import multimodal
from onstream.pipeline.models.loading import text_config
from onstream.pipeline.models.multimodal import Features
from onstream.pipeline.models.packing import PrefixGroup, SharedPrefixRow, share_prompts
from onstream.pipeline.models.trial import decoder_of, row_dependent_positions


def single_rows(
    prompts: Sequence[npt.ArrayLike],
    completions: Sequence[npt.ArrayLike],
    images: Sequence[tuple[str, ...]] | None = None,
) -> list[PrefixGroup]:
    """Every sequence with a prompt of its own, longest first, for models that take padded rows.

    In this order, rows of similar length are padded together.

    Raises:
        ValueError: a prompt or a completion is empty.
    """
    groups = share_prompts(prompts, completions, images)
    singles = [
        group.part(index, index + 1) for group in groups for index in range(len(group.completions))
    ]
    return sorted(singles, key=lambda single: -single.tokens)


def padded_hidden_states(
    model: PreTrainedModel, packed: SharedPrefixRow, features: Features
) -> Tensor:
    """The last hidden states [N, H] that predict `packed.targets`, from rows padded on the right.

    From one row at a time where neighbours would matter. There is no mask: the model is causal, so
    no position that is read sees the padding.
    """
    sequences = [(group, completion) for group in packed.groups for completion in group.completions]
    together = len(sequences)
    if row_dependent_positions(text_config(model)):
        together = 1
    states = []
    for first in range(0, len(sequences), together):
        states += _padded_batch(model, sequences[first : first + together], features)
    return torch.cat(states)


def _padded_batch(
    model: PreTrainedModel,
    sequences: Sequence[tuple[PrefixGroup, npt.NDArray[np.integer]]],
    features: Features,
) -> list[Tensor]:
    """The hidden states that predict the completion of each sequence, [C, H] each."""
    rows = [
        torch.cat((torch.from_numpy(group.prompt_ids), torch.from_numpy(completion[:-1])))
        for group, completion in sequences
    ]
    input_ids = pad_sequence(rows, batch_first=True).to(model.device)
    images: dict[str, Tensor] = {}
    shown = [group for group, _ in sequences]
    if any(group.images for group in shown):
        images = multimodal.padded_inputs(model, input_ids, shown, features)
    states = decoder_of(model)(input_ids=input_ids, use_cache=False, **images).last_hidden_state
    return [
        states[row, len(group.prompt_ids) - 1 : len(rows[row])]
        for row, (group, _) in enumerate(sequences)
    ]
