"""The loss of one packed row, chunk by chunk, with the metrics that every loss has.

The loss-mask tokens of the row are gathered from its samples first, as tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onstream.pipeline.models.forward import on_device
from onstream.pipeline.models.packing import SharedPrefixRow
from onstream.pipeline.records import Ids, Logprobs
from onstream.workers.trainer.batches.train_samples import (
    LossFields,
    TrainSample,
    with_equal_top,
)
from onstream.workers.trainer.chunked_loss import TargetTokens, TrainerLogprobs
from onstream.workers.trainer.maths.loss import (
    LossFunction,
    LossInputs,
    reverse_kl,
    reverse_kl_k3,
    tail_from_top,
)
from onstream.workers.trainer.maths.scalars import UNWRITTEN


class StepMetrics:
    """Collects per-token values of a step, chunk by chunk.

    The sums stay on the device until `result` reads them all at once: a read per chunk would make
    the GPU wait.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add per-token values [n], to be averaged over the step."""
        for name, value in values.items():
            total = value.detach().sum(dtype=torch.float64)
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def add_maxima(self, values: Mapping[str, Tensor]) -> None:
        """Keep the largest of per-token values [n]."""
        for name, value in values.items():
            largest = value.detach().max()
            if name in self._maxima:
                largest = torch.maximum(self._maxima[name], largest)
            self._maxima[name] = largest

    def result(self, tokens: int) -> dict[str, float]:
        """The sums divided by `tokens`, and the maxima, by name."""
        maxima = [largest.double() for largest in self._maxima.values()]
        values = torch.stack([*self._sums.values(), *maxima]).tolist()
        names = [*self._sums, *self._maxima]
        result = dict(zip(names, values, strict=True))
        for name in self._sums:
            result[name] /= tokens
        return result


class Mismatch(TypedDict):
    """Of |trainer − generator| over `tokens` tokens, in nats."""

    mean: float
    max: float
    tokens: int


class MismatchTally:
    """How far the trainer's logprobs are from the generator's in a step, by staleness.

    On tokens of the version that takes the step the two should agree up to the rounding of two
    programs: what is left there is the engine's error. On older tokens the weights have moved too.

    Counts, sums and maxima stay on the device until `result` reads them all at once.
    """

    def __init__(self) -> None:
        self._totals: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, mismatch: Tensor, staleness: Tensor, ages: Iterable[int]) -> None:
        """Add |trainer − generator| [n] of tokens with this `staleness` [n].

        Tokens with a staleness that is not in `ages` are left out.
        """
        for age in ages:
            of_age = staleness == age
            count = of_age.sum()
            total = torch.where(of_age, mismatch, 0).sum(dtype=torch.float64)
            largest = torch.where(of_age, mismatch, 0).max()
            if age in self._totals:
                counts, totals, maxima = self._totals[age]
                count = count + counts
                total = total + totals
                largest = torch.maximum(largest, maxima)
            self._totals[age] = count, total, largest

    def result(self) -> dict[int, Mismatch]:
        """The mismatch by staleness, lowest first; without those that no token has."""
        ages = sorted(self._totals)
        if not ages:
            return {}
        rows = [torch.stack([part.double() for part in self._totals[age]]) for age in ages]
        result = {}
        for age, (count, total, largest) in zip(ages, torch.stack(rows).tolist(), strict=True):
            if count:
                result[age] = Mismatch(mean=total / count, max=largest, tokens=int(count))
        return result


def mismatch_metrics(by_staleness: dict[int, Mismatch]) -> dict[str, object]:
    """The step's metrics by name: at staleness 0, and at each as `mismatch_by_staleness`.

    They are None where no policy wrote such tokens.
    """
    fresh = by_staleness.get(0)
    by_name = {str(age): mismatch for age, mismatch in by_staleness.items()}
    return {
        "mismatch_fresh_mean": fresh and fresh["mean"],
        "mismatch_fresh_max": fresh and fresh["max"],
        "mismatch_by_staleness": by_name or None,
    }


class PerSampleLosses:
    """Collects what each sample of one step came to, by the sample's place in the step.

    `loss` is the sum over the sample's loss-mask tokens. `mismatch_max` is the largest
    |trainer − generator| of one of them, in nats, where the loss reads the generator's logprobs. A
    sample without a token in its loss mask is in neither.
    """

    def __init__(self) -> None:
        self.loss: dict[int, float] = {}
        self.mismatch_max: dict[int, float] = {}
        self._tokens: dict[str, list[Tensor]] = {}

    def clear(self) -> None:
        """Forget all, for a step that is tried again."""
        self.loss.clear()
        self.mismatch_max.clear()
        self._tokens.clear()

    def add(self, **values: Tensor) -> None:
        """Take per-token values of the packed row at hand, each [n]."""
        for name, value in values.items():
            self._tokens.setdefault(name, []).append(value.detach().float().cpu())

    def end_row(self, places: Sequence[int], counts: Sequence[int]) -> None:
        """Split the values of a whole row among its samples.

        The row held `counts` tokens of the samples at `places`, one sample after the other.
        """
        per_token = {}
        for name, values in self._tokens.items():
            per_token[name] = torch.split(torch.cat(values), list(counts))
        self._tokens = {}
        for at, (place, count) in enumerate(zip(places, counts, strict=True)):
            if not count:
                continue
            self.loss[place] = float(per_token["loss"][at].sum())
            if "mismatch" in per_token:
                self.mismatch_max[place] = float(per_token["mismatch"][at].max())


class StepValues:
    """What is collected over the rows of one step; `per_sample` where somebody asks for it."""

    def __init__(self, per_sample: PerSampleLosses | None = None) -> None:
        self.metrics = StepMetrics()
        self.mismatch = MismatchTally()
        self.per_sample = per_sample


class RowLoss:
    """The loss of a row's tokens, in the form in which `chunked_loss` calls it.

    `tail_floor` is the least probability of a tail that is computed from the top k.
    """

    def __init__(
        self, loss: LossFunction, tail_floor: float, tokens: RowTokens, step: StepValues
    ) -> None:
        self._loss = loss
        self._tail_floor = tail_floor
        self._tokens = tokens
        self._step = step

    def __call__(self, at: slice, trainer: TrainerLogprobs) -> Tensor:
        """The loss of the tokens `at`, [n]."""
        inputs = self._inputs(at, trainer)
        values = self._loss(inputs)
        metrics = self._step.metrics
        metrics.add({"entropy": trainer.entropy, "loss": values.loss, **values.means})
        metrics.add_maxima(values.maxima)
        self._add_teacher_kl(inputs)
        self._add_mismatch(inputs, at)
        if self._step.per_sample:
            self._step.per_sample.add(loss=values.loss)
        return values.loss

    def _inputs(self, at: slice, trainer: TrainerLogprobs) -> LossInputs:
        tokens = self._tokens
        return LossInputs(
            token_ids=tokens.targets.ids[at],
            trainer_logprobs=trainer.sampled,
            trainer_logprobs_unscaled=trainer.sampled_unscaled,
            entropy=trainer.entropy,
            advantage=tokens.advantage[at],
            generator_logprobs=_part(tokens.generator_logprobs, at),
            teacher_logprobs=_part(tokens.teacher_logprobs, at),
            teacher_baseline=_part(tokens.teacher_baseline, at),
            teacher_top_logprobs=_part(tokens.teacher_top, at),
            teacher_tail_logprobs=self._teacher_tail(at),
            trainer_top_logprobs=trainer.top,
            trainer_tail_logprobs=trainer.tail,
        )

    def _teacher_tail(self, at: slice) -> Tensor | None:
        """The teacher's tail [n], computed from its top k where an endpoint gave none."""
        if self._tokens.teacher_top is None or self._tokens.teacher_tail is None:
            return None
        given = self._tokens.teacher_tail[at]
        computed, floored = tail_from_top(self._tokens.teacher_top[at], self._tail_floor)
        missing = given.isnan()
        self._step.metrics.add({"tail_floored_share": missing * floored})
        return torch.where(missing, computed, given)

    def _add_teacher_kl(self, inputs: LossInputs) -> None:
        if inputs.teacher_logprobs is None:
            return
        kl = reverse_kl(inputs.trainer_logprobs_unscaled, inputs.teacher_logprobs)
        top_k = torch.zeros_like(kl)
        if inputs.teacher_top_logprobs is not None:
            top_k = (~inputs.teacher_top_logprobs.isnan()).sum(-1).to(kl.dtype)
        self._step.metrics.add(
            {"teacher_kl": kl, "teacher_kl_k3": reverse_kl_k3(kl), "teacher_top_k": top_k}
        )

    def _add_mismatch(self, inputs: LossInputs, at: slice) -> None:
        if inputs.generator_logprobs is None:
            return
        mismatch = (inputs.trainer_logprobs.detach() - inputs.generator_logprobs).abs()
        self._step.metrics.add({"mismatch_mean": mismatch})
        self._step.metrics.add_maxima({"mismatch_max": mismatch})
        self._step.mismatch.add(mismatch, self._tokens.staleness[at], self._tokens.ages)
        if self._step.per_sample:
            self._step.per_sample.add(mismatch=mismatch)


def _part(values: Tensor | None, at: slice) -> Tensor | None:
    return None if values is None else values[at]


@dataclass(frozen=True)
class RowTokens:
    """The N loss-mask tokens of one packed row. What the loss does not read is None."""

    kept: Tensor | None  # [N], which of the row's targets they are; None: all
    targets: TargetTokens
    generator_logprobs: Tensor | None  # [N]
    advantage: Tensor  # [N]
    teacher_logprobs: Tensor | None  # [N]
    teacher_baseline: Tensor | None  # [N]
    teacher_top: Tensor | None  # [N, k], NaN where a token has fewer
    teacher_tail: Tensor | None  # [N], NaN where it is to be computed from the top k
    staleness: Tensor  # [N]
    ages: tuple[int, ...]  # every staleness that a token has, of those that a policy wrote


def gather_tokens(
    packed: SharedPrefixRow,
    samples: Sequence[TrainSample],
    fields: LossFields,
    device: torch.device,
) -> RowTokens:
    """What a loss that reads `fields` is given of `samples`, in the order of the row's targets."""
    row = _Row(packed, [samples[place] for place in packed.sequences], device)
    staleness = row.concatenated([_staleness(sample) for sample in row.samples])
    top = with_equal_top(row.samples) if fields.top_k else None
    return RowTokens(
        kept=None if row.mask.all() else on_device(row.mask.nonzero()[0], device),
        targets=_targets(row, fields, None if top is None else row.tensor(top[0]).long()),
        generator_logprobs=_generator_logprobs(row, fields),
        advantage=row.repeated([sample.advantage for sample in row.samples]),
        teacher_logprobs=_teacher_logprobs(row, fields),
        teacher_baseline=_teacher_baseline(row),
        teacher_top=None if top is None else row.tensor(top[1]),
        teacher_tail=None if top is None else row.tensor([_tail(one) for one in row.samples]),
        staleness=on_device(staleness, device),
        ages=tuple(int(age) for age in np.unique(staleness) if age != UNWRITTEN),
    )


def with_tokens(
    rows: Sequence[SharedPrefixRow], gather: Callable[[SharedPrefixRow], RowTokens], *, ahead: bool
) -> Iterator[tuple[SharedPrefixRow, RowTokens]]:
    """Each of `rows` with its tokens; with `ahead` a thread gathers them during the row before."""
    if not ahead:
        for row in rows:
            yield row, gather(row)
        return
    with ThreadPoolExecutor(1, "gather") as thread:
        coming = thread.submit(gather, rows[0])
        for row, after in zip_longest(rows, rows[1:]):
            tokens = coming.result()
            if after is not None:
                coming = thread.submit(gather, after)
            yield row, tokens


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
        return on_device(self.concatenated(values), self.device)

    def repeated(self, values: Sequence[float]) -> Tensor:
        """A value a sample, repeated for each of its tokens."""
        each = np.repeat(np.array(values, dtype=np.float32), self.packed.lengths)
        return on_device(each[self.mask], self.device)


def _targets(row: _Row, fields: LossFields, top_ids: Tensor | None) -> TargetTokens:
    temperatures = None
    if fields.generator and any(sample.temperature != 1.0 for sample in row.samples):
        temperatures = row.repeated([sample.temperature for sample in row.samples])
    ids = on_device(row.packed.targets[row.mask], row.device)
    return TargetTokens(ids, temperatures, top_ids)


def _generator_logprobs(row: _Row, fields: LossFields) -> Tensor | None:
    if not fields.generator:
        return None
    return row.tensor([sample.generator_logprobs for sample in row.samples])


def _teacher_logprobs(row: _Row, fields: LossFields) -> Tensor | None:
    """None too where a sample has none, as it may be where they are for the metrics alone."""
    given = _present([sample.teacher_logprobs for sample in row.samples])
    if not fields.teacher or len(given) < len(row.samples):
        return None
    return row.tensor(given)


def _teacher_baseline(row: _Row) -> Tensor | None:
    baselines = [sample.teacher_baseline for sample in row.samples]
    return row.repeated(baselines) if any(baselines) else None


def _tail(sample: TrainSample) -> Logprobs:
    """The tail's logprobs [C], NaN where the teacher gave none."""
    if sample.teacher_tail_logprobs is not None:
        return sample.teacher_tail_logprobs
    return np.full(len(sample.completion_ids), np.nan, dtype=np.float32)


def _staleness(sample: TrainSample) -> Ids:
    """[C], `UNWRITTEN` everywhere where nobody said who wrote it."""
    if sample.staleness is not None:
        return sample.staleness
    return np.full(len(sample.completion_ids), UNWRITTEN, dtype=np.int32)


def _present(arrays: Sequence[Ids | Logprobs | None]) -> list[Ids | Logprobs]:
    return [array for array in arrays if array is not None]
