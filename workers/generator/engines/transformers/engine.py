"""The built-in engine: a transformers causal language model that decodes from a slot cache.

A request waits until it gets a slot. A step is one forward pass, in which the prompts of new slots
and one token of every other slot lie in one packed row. New weights send all that runs back to the
head of the queue with what was written so far; the next step computes its keys and values again,
shared prompts once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.loading import (
    load_model,
    resolve_device,
    resolve_dtype,
    set_text_attention,
    text_config,
)
from onstream.pipeline.models.multimodal import (
    has_spatial_positions,
    prompt_positions,
    tensors_for,
)
from onstream.pipeline.models.trial import row_dependent_positions, short_windows
from onstream.pipeline.models.weight_shapes import WeightShapes
from onstream.pipeline.records import FinishReason, Ids, VersionSpan
from onstream.pipeline.weights import LoadedPolicy, WeightsError
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.engines.transformers.decoding_step import (
    PromptKey,
    SequenceState,
    StepInput,
    draw,
    step_input,
    uniforms,
)
from onstream.workers.generator.engines.transformers.slot_cache import (
    ATTENTION,
    SlotCache,
    UnsupportedAttention,
)
from onstream.workers.generator.student import StudentModel, require_possible

_SAMPLED_AT_ONCE = 1 << 24
"""Elements of [rows, vocabulary] whose float64 cumulative sum exists at once."""
_UINT64 = (1 << 64) - 1


def open_engine(student: StudentModel) -> TransformersEngine:
    """The engine for `student`, on the device and at the precision of its settings.

    Raises:
        UserError: there is no such model, or the engine cannot serve it.
    """
    settings = student.settings
    device = resolve_device(settings.deployment.device)
    dtype = resolve_dtype(settings.inference.dtype, device)
    return TransformersEngine(
        load_model(student.name, dtype=dtype, device=device),
        student.stop_ids,
        slots=settings.inference.max_batch,
        on_new_weights=settings.inference.on_new_weights,
    )


class TransformersEngine:
    """An `Engine` over a causal language model whose attention uses the AttentionInterface.

    Args:
        model: in evaluation mode, on its device; the engine owns it from here on.
        stop_ids: a completion ends with any of these.
        slots: completions decoded at once.
        prefill_tokens: tokens of prompts, including attention's padding, in one step; more only
            where a single prompt is longer.
        on_new_weights: what becomes of running completions. `recompute` their keys and values, so
            that each token is drawn from what the new weights alone would give (`abort` does the
            same here); `keep` the old ones, which is cheaper and inexact; or `wait` until they are
            finished, and start no others meanwhile.

    Raises:
        UserError: slot attention does not compute this model exactly.
    """

    def __init__(
        self,
        model: Any,
        stop_ids: Collection[int],
        *,
        slots: int,
        prefill_tokens: int = 8192,
        on_new_weights: Literal["recompute", "keep", "wait", "abort"] = "recompute",
    ) -> None:
        self._model = model
        self._stop = frozenset(stop_ids)
        self._slots = slots
        self._prefill_tokens = prefill_tokens
        self._on_new_weights = on_new_weights
        self._version = 0
        self._shapes = WeightShapes.of(model)
        self._next_policy: LoadedPolicy | None = None  # loaded when what runs is finished
        self._waiting: deque[SequenceState] = deque()
        self._running: list[SequenceState] = []
        self._cached = 0  # the first slots, whose cache lacks only their last token
        self._context: int | None = getattr(
            model.config.get_text_config(), "max_position_embeddings", None
        )
        self._cache = SlotCache(slots, self._context)
        self._require_exact()

    @property
    def max_context(self) -> int | None:
        return self._context

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def replicas(self) -> int:
        return 1

    @property
    def problem(self) -> str:
        return ""

    @property
    def active(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, requests: Sequence[GenerationRequest]) -> None:
        for request in requests:
            require_possible(request, self._context)
            self._waiting.append(SequenceState(request, self._space(request)))

    @property
    def version(self) -> int:
        return self._version

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        if self._next_policy is not None and not self._running:
            self._switch(self._next_policy)
        if self._next_policy is None:
            self._fill_slots()
        if not self._running:
            return []
        row = step_input(
            self._cache,
            self._running,
            self._cached,
            device=self._model.device,
            dtype=self._model.dtype,
        )
        ids, logprobs = self._draw(self._forward(row))
        drawn = zip(self._running, ids.tolist(), logprobs.tolist(), strict=True)
        for sequence, token, logprob in drawn:
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
        return self._finish()

    def load(self, policy: LoadedPolicy) -> None:
        if misfit := self._shapes.misfit(policy.shapes):
            raise WeightsError(misfit)
        if self._on_new_weights == "wait" and self._running:
            self._next_policy = policy
        else:
            self._switch(policy)

    def close(self) -> None:
        """Nothing runs but in `step`."""

    def _switch(self, policy: LoadedPolicy) -> None:
        _copy_weights(self._model, policy.tensors())
        self._version = policy.number
        self._next_policy = None
        if self._on_new_weights == "keep":
            for sequence in self._running:
                sequence.spans.append((policy.number, len(sequence.token_ids)))
            return
        self._waiting.extendleft(reversed(self._running))
        self._running = []
        self._cached = 0

    def _fill_slots(self) -> None:
        """Give free slots to those that wait, as far as `prefill_tokens` allows.

        What counts is the padded grid: prompts by the longest prompt, and completions that are
        computed again by the longest completion.
        """
        prompts = set[PromptKey]()
        completions = longest_prompt = longest_completion = 0
        while self._waiting and len(self._running) < self._slots:
            sequence = self._waiting[0]
            if sequence.prompt not in prompts and self._better_later():
                return
            longest_prompt = max(longest_prompt, len(sequence.request.prompt_ids))
            longest_completion = max(longest_completion, len(sequence.token_ids))
            completions += bool(sequence.token_ids)
            prompt_tokens = len(prompts | {sequence.prompt}) * longest_prompt
            tokens = prompt_tokens + completions * longest_completion
            if prompts and tokens > self._prefill_tokens:
                return
            prompts.add(sequence.prompt)
            self._start(self._waiting.popleft())

    def _start(self, sequence: SequenceState) -> None:
        if not sequence.spans or sequence.spans[-1][0] != self._version:
            sequence.spans.append((self._version, len(sequence.token_ids)))
        self._running.append(sequence)

    def _better_later(self) -> bool:
        """Whether the next group should wait for more free slots.

        It should where it has more rollouts than there are free slots, and few slots are free.
        Split, its prompt would be computed twice; waiting leaves at most an eighth of the slots
        empty for a step or so.
        """
        free = self._slots - len(self._running)
        if not self._running or free > self._slots // 8 or free >= len(self._waiting):
            return False
        return self._waiting[0].prompt == self._waiting[free].prompt

    def _space(self, request: GenerationRequest) -> Any:
        """Where the prompt's tokens lie in time, height and width [3, P].

        None where the model counts tokens, or the prompt has no image.
        """
        if not request.images or not has_spatial_positions(self._model):
            return None
        features = [image.features for image in request.images]
        return prompt_positions(self._model, request.prompt_ids, features).numpy()

    def _forward(self, row: StepInput) -> Tensor:
        """Logits [n, V] after the last token of each slot."""
        output = self._model(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            use_cache=False,
            logits_to_keep=row.last,
            onstream_pass=row.forward_pass,
            **self._image_tensors(row),
        )
        logits: Tensor = output.logits[0]
        return logits

    def _image_tensors(self, row: StepInput) -> dict[str, Tensor]:
        if not row.images:
            return {}
        return tensors_for(self._model, [image.features for image in row.images])

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each slot [n] and its logprob [n], from logits [n, V]."""
        requests = [sequence.request for sequence in self._running]
        temperatures = [request.temperature for request in requests]
        uniform = uniforms(
            [request.seed & _UINT64 for request in requests],
            [len(sequence.token_ids) for sequence in self._running],
        )
        ids = []
        logprobs = []
        size = max(1, _SAMPLED_AT_ONCE // logits.shape[-1])
        for start in range(0, len(requests), size):
            part = slice(start, start + size)
            part_ids, part_logprobs = draw(logits[part], temperatures[part], uniform[part])
            ids.append(part_ids)
            logprobs.append(part_logprobs)
        return torch.cat(ids), torch.cat(logprobs)

    def _finish(self) -> list[Completion]:
        """Hand back what is finished, and move the last slots into the holes.

        Slots 0 … n−1 are then in use again, and all of them are cached but for their last token.
        """
        done = [slot for slot, row in enumerate(self._running) if self._finish_reason(row)]
        completions = [self._completion(self._running[slot]) for slot in done]
        left = len(self._running) - len(done)
        finished = set(done)
        holes = [slot for slot in done if slot < left]
        movers = [slot for slot in range(left, len(self._running)) if slot not in finished]
        if holes:
            self._cache.move(movers, holes, max(self._running[slot].length for slot in movers))
        for hole, mover in zip(holes, movers, strict=True):
            self._running[hole] = self._running[mover]
        del self._running[left:]
        self._cached = left
        return completions

    def _finish_reason(self, row: SequenceState) -> FinishReason | None:
        if row.token_ids[-1] in self._stop:
            return "stop"
        return "length" if len(row.token_ids) >= row.request.max_tokens else None

    def _completion(self, row: SequenceState) -> Completion:
        reason = self._finish_reason(row)
        assert reason is not None
        ends = [start for _, start in row.spans[1:]] + [len(row.token_ids)]
        spans = [
            VersionSpan(version, start, end)
            for (version, start), end in zip(row.spans, ends, strict=True)
            if end > start
        ]
        return Completion(
            key=row.request.key,
            token_ids=np.array(row.token_ids, dtype=np.int32),
            logprobs=np.array(row.logprobs, dtype=np.float32),
            finish_reason=reason,
            version_spans=spans,
        )

    @torch.inference_mode()
    def _require_exact(self) -> None:
        """Write a few tokens of three prompts, two of them the same, and compare their logprobs.

        They must be those of one plain forward pass over each completion. The prompts are longer
        than the windows, which are made short for this.
        """
        config = text_config(self._model)
        if reason := row_dependent_positions(config):
            raise _cannot_serve(self._model, reason)
        with short_windows(self._model):
            self._compare_with_plain(config._attn_implementation)
        set_text_attention(self._model, ATTENTION)

    def _compare_with_plain(self, plain: str) -> None:
        size = text_config(self._model).vocab_size
        prompts = [np.arange(1, count, dtype=np.int32) % size for count in (23, 23, 5)]
        try:
            set_text_attention(self._model, ATTENTION)
            completions = self._write_some(prompts)
        except (UnsupportedAttention, TypeError, ValueError, RuntimeError) as error:
            raise _cannot_serve(self._model, str(error).splitlines()[0]) from error
        finally:
            set_text_attention(self._model, plain)
        if not self._cache.layers:
            raise _cannot_serve(
                self._model, "its attention does not go through the AttentionInterface"
            )
        gap = max(_gap(self._model, prompts[one.key], one) for one in completions)
        if gap > (1e-3 if self._model.dtype == torch.float32 else 0.5):
            raise _cannot_serve(
                self._model,
                f"its logprobs differ by {gap:.2g} nats from those of a plain forward pass",
            )

    def _write_some(self, prompts: Sequence[Ids]) -> list[Completion]:
        """Six tokens after each of `prompts`, whichever tokens they are."""
        stop = self._stop
        self._stop = frozenset()
        self.add(
            [
                GenerationRequest(key, prompt, max_tokens=6, seed=key)
                for key, prompt in enumerate(prompts)
            ]
        )
        completions = []
        while self.active:
            completions += self.step()
        self._stop = stop
        return completions


def _gap(model: Any, prompt_ids: Ids, completion: Completion) -> float:
    """The largest difference, in nats, between `completion`'s logprobs and a plain forward pass."""
    tokens = np.concatenate([prompt_ids, completion.token_ids]).astype(np.int64)
    ids = torch.from_numpy(tokens).to(model.device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    logprobs = logits.float().log_softmax(dim=-1)
    plain = logprobs.gather(-1, ids[len(prompt_ids) :, None])[:, 0]
    return float((plain.cpu() - torch.from_numpy(completion.logprobs)).abs().max())


def _cannot_serve(model: Any, why: str) -> UserError:
    return UserError(
        f"the generator cannot serve {type(model).__name__}: {why}",
        expected="full attention in every layer, through transformers' AttentionInterface, "
        "as in Qwen3, Qwen2 or Llama",
        next_step="Choose another `model.name`.",
    )


@torch.no_grad()
def _copy_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Overwrite the model's parameters; of those that share memory, those that `weights` has."""
    for name, tensor in model.state_dict().items():
        if name in weights:
            tensor.copy_(weights[name])
