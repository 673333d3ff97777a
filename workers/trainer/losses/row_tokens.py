"""The loss-mask tokens of a packed row as tensors, gathered from its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onstream.pipeline.models.packing import SharedPrefixRow
from onstream.settings.sections.losses import Loss
from onstream.workers.trainer.batches.train_sample import Floats, Ids, TrainSample
from onstream.workers.trainer.chunked_loss import TargetTokens
from onstream.workers.trainer.maths.staleness import UNWRITTEN


@dataclass(frozen=True)
class RowTokens:
    """The N loss-mask tokens of one packed row. What the loss does not read is None."""

    kept: Tensor | None  # [N], which of the row's targets they are; None: all
    targets: TargetTokens
    generator_logprobs: Tensor | None  # [N]
    advantage: Tensor  # [N]
    teacher_logprobs: Tensor | None  # [N]
    teacher_top: Tensor | None  # [N, k]
    teacher_tail: Tensor | None  # [N], NaN where it is to be computed from the top k
    staleness: Tensor  # [N]
    ages: tuple[int, ...]  # every staleness that a token has, of those that a policy wrote


def gather_tokens(
    packed: SharedPrefixRow, samples: Sequence[TrainSample], loss: Loss, device: torch.device
) -> RowTokens:
    """What `loss` reads of `samples`, in the order of the row's targets."""
    row = _Row(packed, [samples[place] for place in packed.sequences], device)
    staleness = row.concatenated([_staleness(sample) for sample in row.samples])
    return RowTokens(
        kept=None if row.mask.all() else torch.from_numpy(row.mask.nonzero()[0]).to(device),
        targets=_targets(row, loss),
        generator_logprobs=_generator_logprobs(row, loss),
        advantage=row.repeated([sample.advantage for sample in row.samples]),
        teacher_logprobs=_teacher_logprobs(row, loss),
        teacher_top=_teacher_top(row, loss),
        teacher_tail=_teacher_tail(row, loss),
        staleness=torch.from_numpy(staleness).to(device),
        ages=tuple(int(age) for age in np.unique(staleness) if age != UNWRITTEN),
    )


class _Row:
    """The samples of a row in the order of its targets; makes tensors of their arrays."""

    def __init__(
        self, packed: SharedPrefixRow, samples: list[TrainSample], device: torch.device
    ) -> None:
        self.packed = packed
        self.samples = samples
        self.device = device
        self.mask = np.concatenate([sample.loss_mask for sample in samples]).astype(bool)

    def concatenated(self, values: Sequence[npt.NDArray[np.generic]]) -> npt.NDArray[np.generic]:
        """Arrays of a value a token, one a sample, as one without the tokens outside the mask."""
        kept: npt.NDArray[np.generic] = np.concatenate(values)[self.mask]
        return kept

    def tensor(self, values: Sequence[npt.NDArray[np.generic]]) -> Tensor:
        """The same, on the device."""
        return torch.from_numpy(self.concatenated(values)).to(self.device)

    def repeated(self, values: Sequence[float]) -> Tensor:
        """A value a sample, repeated for each of its tokens."""
        each = np.repeat(np.array(values, dtype=np.float32), self.packed.lengths)
        return torch.from_numpy(each[self.mask]).to(self.device)


def _targets(row: _Row, loss: Loss) -> TargetTokens:
    temperatures = top_ids = None
    if loss.reads_generator and any(sample.temperature != 1.0 for sample in row.samples):
        temperatures = row.repeated([sample.temperature for sample in row.samples])
    if loss.needs_top_k:
        top_ids = row.tensor(_present([sample.teacher_top_ids for sample in row.samples])).long()
    ids = torch.from_numpy(row.packed.targets[row.mask]).to(row.device)
    return TargetTokens(ids, temperatures, top_ids)


def _generator_logprobs(row: _Row, loss: Loss) -> Tensor | None:
    if not loss.reads_generator:
        return None
    return row.tensor([sample.generator_logprobs for sample in row.samples])


def _teacher_logprobs(row: _Row, loss: Loss) -> Tensor | None:
    """None too where a sample has none, as it may be where they are for the metrics alone."""
    given = _present([sample.teacher_logprobs for sample in row.samples])
    if not loss.reads_teacher or len(given) < len(row.samples):
        return None
    return row.tensor(given)


def _teacher_top(row: _Row, loss: Loss) -> Tensor | None:
    if not loss.needs_top_k:
        return None
    return row.tensor(_present([sample.teacher_top_logprobs for sample in row.samples]))


def _teacher_tail(row: _Row, loss: Loss) -> Tensor | None:
    if not loss.needs_top_k:
        return None
    return row.tensor([_tail(sample) for sample in row.samples])


def _tail(sample: TrainSample) -> Floats:
    """The tail's logprobs [C], NaN where the teacher gave none."""
    if sample.teacher_tail_logprobs is not None:
        return sample.teacher_tail_logprobs
    return np.full(len(sample.completion_ids), np.nan, dtype=np.float32)


def _staleness(sample: TrainSample) -> Ids:
    """[C], `UNWRITTEN` everywhere where nobody said who wrote it."""
    if sample.staleness is not None:
        return sample.staleness
    return np.full(len(sample.completion_ids), UNWRITTEN, dtype=np.int32)


def _present(arrays: Sequence[Ids | Floats | None]) -> list[Ids | Floats]:
    return [array for array in arrays if array is not None]
