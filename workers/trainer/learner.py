"""Takes training steps: samples in, better weights out.

It knows no streams, and no files but the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.images.vision import load_vision
from onstream.pipeline.models.end_tokens import add_stops, end_token_ids
from onstream.pipeline.models.forward import NO_IMAGES, hidden_states, plan_attention, rows_for
from onstream.pipeline.models.frozen import round_frozen
from onstream.pipeline.models.learning_rate import with_learning_rate
from onstream.pipeline.models.loading import base_of, load_model, resolve_dtype, text_config
from onstream.pipeline.models.multimodal import Features
from onstream.pipeline.models.output_layer import head_of
from onstream.pipeline.models.packing import SharedPrefixRow
from onstream.pipeline.models.prompt_sharing import choose_attention, prepare
from onstream.pipeline.models.recompute import recompute_layers
from onstream.pipeline.models.tokenizer import has_vision, load_student_tokenizer
from onstream.pipeline.records import Ids
from onstream.pipeline.weights import PolicyPacker, WeightSum
from onstream.pipeline.weights.policy import unadapted, values_of
from onstream.settings.sections.run import ModelSettings
from onstream.settings.sections.trainer import TrainerSettings
from onstream.workers.trainer import lora
from onstream.workers.trainer.batches.train_samples import LossFields, TrainSample, check_samples
from onstream.workers.trainer.chunked_loss import chunked_loss
from onstream.workers.trainer.losses import loss_function
from onstream.workers.trainer.losses.row_loss import (
    PerSampleLosses,
    RowLoss,
    RowTokens,
    StepValues,
    gather_tokens,
    mismatch_metrics,
    with_tokens,
)
from onstream.workers.trainer.maths.scalars import learning_rate
from onstream.workers.trainer.optimizer import hidden_matrices, load_optimizer, new_optimizer

__all__ = ["Learner", "TrainSample"]

LEARNER_METRICS = (
    "loss",
    "loss_policy",
    "loss_teacher",
    "loss_kl",
    "teacher_kl",
    "teacher_kl_k3",
    "teacher_top_k",
    "entropy",
    "ratio_mean",
    "ratio_max",
    "mismatch_mean",
    "mismatch_max",
    "mismatch_fresh_mean",
    "mismatch_fresh_max",
    "mismatch_by_staleness",
    "masked_share",
    "tail_floored_share",
    "grad_norm",
    "lr",
    "tokens",
)
"""Metrics of a step that the learner computes.

None in a row where the loss or the teacher gives them no meaning.
"""


class GradientNotFinite(UserError):
    """The gradient of a step has no finite norm; `norm` is what it has."""

    def __init__(self, step: int, norm: float, lr: float) -> None:
        super().__init__(
            f"the gradient norm of step {step} is {norm}",
            expected="a finite gradient",
            next_step="`onstream dead list` has the rollouts that were given up for it. Where they "
            f"are as they should be, lower trainer.optim.lr (now {lr:g}). "
            f"The weights of step {step - 1} are kept.",
            exit=Exit.REFUSED,
        )
        self.norm = norm


class Learner:
    """The student with its optimizer: float32 master weights, computed with in `dtype`.

    With `trainer.lora` only an adapter is trained, and the weights under it are kept in `dtype`.
    What is saved has the chat template and the end tokens that `student` says.
    The model stays in evaluation mode: dropout would make its logprobs differ from the generator's.
    `padded_because` is None where shared prompts are computed once, else the reason why the model's
    code cannot do it. Token ids are below `vocabulary`. With `prepares_ahead`, on CUDA, threads
    make ready what comes next; on a CPU they would take its time. With `recompute` each layer is
    computed anew in the backward pass.

    Raises:
        UserError: the model, its tokenizer or a custom loss cannot be loaded, its head is no plain
            projection, or it has no such layers to adapt or to recompute.
    """

    def __init__(
        self,
        model: str | Path,
        trainer: TrainerSettings,
        device: torch.device,
        student: ModelSettings | None = None,
        *,
        recompute: bool = False,
    ) -> None:
        student = student or ModelSettings()
        self.device = device
        self.prepares_ahead = device.type == "cuda"
        self.dtype = resolve_dtype(trainer.dtype, device)
        self.tokenizer = load_student_tokenizer(model, student)
        self._loss_function = loss_function(trainer.loss)
        self._loss_fields = LossFields.of(trainer.loss)
        self._tail_floor = trainer.loss.teacher_tail_floor
        base = base_of(model)
        self.model = load_model(base or model, dtype=torch.float32, device=device)
        self.take_settings(trainer)
        add_stops(self.model, end_token_ids(self.tokenizer, student.end_tokens))
        self.padded_because = prepare(self.model)
        self._adapter = None
        if trainer.lora:
            self._adapter = lora.attach(self.model, trainer.lora, saved=model if base else None)
            if self.dtype == torch.bfloat16:
                round_frozen(self.model)
        self._recompute = recompute
        if recompute:
            drops = trainer.lora is not None and trainer.lora.dropout > 0
            recompute_layers(self.model, draws_random=drops)
        with lora.without_dropout(self.model):
            choose_attention(self.model, trainer.attention, self.dtype, self.padded_because)
        self.head = head_of(self.model)
        self.vision = load_vision(model) if has_vision(self.model.config) else None
        if self.vision and not trainer.train_vision:
            self.model.get_encoder(modality="image").requires_grad_(False)
        self.vocabulary: int = self.model.get_input_embeddings().num_embeddings
        context: int | None = getattr(text_config(self.model), "max_position_embeddings", None)
        self.context_tokens = context
        self.steps = 0
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self._optimizer = new_optimizer(trained, self.trainer.optim, hidden_matrices(self.model))

    def take_settings(self, trainer: TrainerSettings) -> None:
        """Go on by `trainer`, as one does that resumes its run with other settings."""
        self.trainer = with_learning_rate(trainer, self.model.config.to_dict())
        self._peak_rate = self.trainer.optim.known_lr

    def check(self, *samples: TrainSample) -> None:
        """Make sure that a step can train on `samples`; `step` does so before it changes anything.

        Raises:
            ValueError: it cannot.
        """
        check_samples(samples, self._loss_fields, self.vocabulary)
        for sample in samples:
            tokens = len(sample.prompt_ids) + len(sample.completion_ids)
            if self.context_tokens is not None and tokens > self.context_tokens:
                raise ValueError(
                    f"a sample of group {sample.group} has {tokens} tokens; "
                    f"expected at most the student's context of {self.context_tokens}"
                )
            if sample.images and self.vision is None:
                raise ValueError(
                    f"a sample of group {sample.group} shows {len(sample.images)} images; "
                    "the student reads none"
                )

    def step(
        self,
        samples: Sequence[TrainSample],
        max_steps: int,
        *,
        features: Features = NO_IMAGES,
        global_tokens: int | None = None,
        per_sample: PerSampleLosses | None = None,
    ) -> dict[str, Any]:
        """One optimizer step over `samples`; returns its metrics by their names in metrics.jsonl.

        `max_steps` is where a falling schedule ends. `features` holds the images that the samples
        show. `per_sample` collects the loss of each sample. The loss is divided by
        `global_tokens`, the loss-mask tokens of all ranks; None: this process is the only one.

        Raises:
            ValueError: a sample cannot be trained on, or no token is in the loss mask.
            GradientNotFinite: the weights are as they were.
        """
        self.check(*samples)
        tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
        if not tokens:
            raise ValueError(
                f"none of the {len(samples)} samples has a token in its loss mask; "
                "expected at least one in a step"
            )
        values = StepValues(per_sample)
        divisor = global_tokens or tokens
        for packed, row in self._rows(samples):
            loss: Any = self._loss(packed, row, samples, features, values) / divisor
            loss.backward()
        return {
            **values.metrics.result(divisor),
            **mismatch_metrics(values.mismatch.result()),
            **self._update(max_steps),
            "tokens": float(tokens),
        }

    def sample_losses(
        self, samples: Sequence[TrainSample], *, features: Features = NO_IMAGES
    ) -> dict[int, float]:
        """The loss of each of `samples` by its place; none of one without a loss-mask token."""
        values = StepValues(PerSampleLosses())
        for packed, row in self._rows(samples):
            self._loss(packed, row, samples, features, values)
        assert values.per_sample is not None
        return values.per_sample.loss

    def _rows(self, samples: Sequence[TrainSample]) -> Iterator[tuple[SharedPrefixRow, RowTokens]]:
        rows = self.pack(
            [sample.prompt_ids for sample in samples],
            [sample.completion_ids for sample in samples],
            [sample.images for sample in samples],
        )
        return with_tokens(rows, partial(self._gather, samples), ahead=self.prepares_ahead)

    def _gather(self, samples: Sequence[TrainSample], packed: SharedPrefixRow) -> RowTokens:
        plan_attention(self.model, packed)
        return gather_tokens(packed, samples, self._loss_fields, self.device)

    def pack(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        images: Sequence[tuple[str, ...]] | None = None,
    ) -> list[SharedPrefixRow]:
        """Prompts, with the images that they show, and completions as rows of forward passes."""
        return rows_for(self.model, prompts, completions, images, self.trainer.microbatch)

    def hidden(self, packed: SharedPrefixRow, features: Features = NO_IMAGES) -> Tensor:
        """The last hidden states [N, H] that predict the packed targets, in `dtype`."""
        with torch.autocast(
            self.device.type,
            self.dtype,
            enabled=self.dtype != torch.float32,
            # A cast that is cached lives until the end of the pass: those of all layers at once.
            cache_enabled=not self._recompute,
        ):
            return hidden_states(self.model, packed, features).to(self.dtype)

    def _loss(
        self,
        packed: SharedPrefixRow,
        tokens: RowTokens,
        samples: Sequence[TrainSample],
        features: Features,
        values: StepValues,
    ) -> Tensor:
        """The summed loss of one packed row; its metrics go to `values`."""
        hidden = self.hidden(packed, features)
        if tokens.kept is not None:
            hidden = hidden.index_select(0, tokens.kept)
        loss = chunked_loss(
            hidden,
            self.head,
            tokens.targets,
            RowLoss(self._loss_function, self._tail_floor, tokens, values),
            chunk=self.trainer.head_chunk,
        )
        if values.per_sample:
            counts = [int(samples[place].loss_mask.sum()) for place in packed.sequences]
            values.per_sample.end_row(packed.sequences, counts)
        return loss

    def _update(self, max_steps: int) -> dict[str, float]:
        """Clip the gradient and take the optimizer's step."""
        optim = self.trainer.optim
        clipped = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), optim.max_grad_norm, foreach=True
        )
        norm = float(clipped)
        if not math.isfinite(norm):
            self._optimizer.zero_grad()
            raise GradientNotFinite(self.steps + 1, norm, self._peak_rate)
        rate = learning_rate(
            self.steps + 1,
            peak=self._peak_rate,
            warmup=optim.warmup,
            max_steps=max_steps,
            schedule=optim.schedule,
            min_ratio=optim.min_lr_ratio,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.steps += 1
        return {"grad_norm": norm, "lr": rate}

    def state(self) -> dict[str, Any]:
        """Steps taken, optimizer and RNG state, as `torch.load(weights_only=True)` reads them.

        With `save_checkpoint` it is all that a checkpoint needs. The learning rate follows from the
        step and the settings.
        """
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        return {
            "steps": self.steps,
            "optimizer": self._optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": cuda,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from the `state()` of a learner with the same weights; on a CPU bit for bit."""
        self.steps = state["steps"]
        load_optimizer(self._optimizer, state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        if self.device.type == "cuda" and state["cuda_rng"]:
            torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda_rng"]])

    def save_model(self, directory: Path) -> None:
        """Write a model directory that transformers loads, in float32, with any adapter merged."""
        merged = lora.merged_state(self.model) if self._adapter else None
        self.model.save_pretrained(directory, state_dict=merged)
        self._save_tokenizer(directory)

    def checkpoint_weights(self) -> dict[str, Tensor]:
        """The weights that `save_checkpoint` writes; the next step changes them."""
        return lora.adapter_state(self._adapter) if self._adapter else self.model.state_dict()

    def save_checkpoint(self, directory: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write what a `Learner` starts from: the model's files with `weights`, or the adapter's.

        They are a copy of `checkpoint_weights`; None: those of now.
        """
        if self._adapter is None:
            self.model.save_pretrained(directory, state_dict=weights)
        else:
            lora.save_adapter(self._adapter, directory, weights)
        self._save_tokenizer(directory)

    def _save_tokenizer(self, directory: Path) -> None:
        if self.vision:
            self.vision.save(directory)
        # After the processor, whose tokenizer is that of the model's own files.
        self.tokenizer.save_pretrained(directory)

    def before_update(self, call: Callable[[], None]) -> None:
        """Have `call` return before each step of the optimizer, which changes the weights."""
        self._optimizer.register_step_pre_hook(lambda *_: call())

    def packer(self, *, whole: bool) -> PolicyPacker:
        """What makes versions of `live_state`: `whole` ones, or adapters with `trainer.lora`."""
        as_adapters = self._adapter is not None and not whole
        config = lora.configuration(self._adapter) if as_adapters else None
        return PolicyPacker(self.dtype, config)

    def published_state(self) -> dict[str, Tensor]:
        """The weights as generators get them: on the CPU, in `dtype`, as `live_state` has them."""
        return {
            name: values_of(weight).to("cpu", self.dtype)
            for name, weight in self.live_state().items()
        }

    def live_state(self) -> dict[str, Tensor | WeightSum]:
        """The weights themselves, any adapter merged, where they are and in the dtype they have.

        They have the names and shapes of the model's files. Weights that are tied are there once.
        The next step changes them, so they have to be copied before it does. An adapter is merged
        tensor by tensor when they are, unless the files have other tensors than the model.
        """
        state = lora.live_state(self.model) if self._adapter else self.model.state_dict()
        bases: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, weight in state.items():
            base = unadapted(weight)
            if base.data_ptr() not in seen:
                seen.add(base.data_ptr())
                bases[name] = base.detach()
        in_files: dict[str, Tensor | WeightSum] = revert_weight_conversion(self.model, bases)
        if not self._adapter:
            return in_files
        names = {id(base): name for name, base in bases.items()}
        if any(id(tensor) not in names for tensor in in_files.values()):
            merged = {name: values_of(state[name]).detach() for name in bases}
            return dict(revert_weight_conversion(self.model, merged))
        return {name: state[names[id(tensor)]] for name, tensor in in_files.items()}
