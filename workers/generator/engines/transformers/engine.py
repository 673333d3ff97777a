"""The built-in engine: a transformers causal language model that decodes from a slot cache.

A request waits until it gets a slot; a step takes one forward pass, in which the prompts of new
slots and one token of each other slot lie in one packed row. New weights send all that runs back to
the head of the queue with what was written so far, so that the next step computes its keys and
values anew, shared prompts once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.loading import set_text_attention, text_config
from onstream.pipeline.models.multimodal import has_spatial_positions, prompt_positions, tensors_for
from onstream.pipeline.models.weight_shapes import WeightShapes
from onstream.pipeline.records import FinishReason, VersionSpan
from onstream.pipeline.weights import LoadedPolicy, WeightsError
from onstream.workers.generator.engines.base import Completion, GenerationRequest, require_possible
from onstream.workers.generator.engines.transformers.packed_row import (
    PackedRow,
    PromptKey,
    SequenceState,
    lay_out,
)
from onstream.workers.generator.engines.transformers.sampling import draw, uniforms
from onstream.workers.generator.engines.transformers.slot_cache import (
    ATTENTION,
    SlotCache,
    UnsupportedAttention,
)

_SAMPLED_AT_ONCE = (
    1 << 24
)  # elements of [rows, vocabulary] whose float64 cumulative sum exists at once
_UINT64 = (1 << 64) - 1


class TransformersEngine:
    """An `Engine` over `model`, any causal language model whose attention goes through
    transformers' AttentionInterface.

    Args:
        model: in evaluation mode, on its device; the engine owns it from here on.
        stop_ids: a completion ends with any of these.
        slots: completions decoded at once.
        prefill_tokens: tokens, padding in attention included, that one step takes beside one for
            each running completion; more only where a single prompt is longer.
        on_new_weights: `recompute` the running completions' keys and values under new weights, so
            that each token is drawn from what the new weights alone would give (`abort` does the
            same here); `keep` the old ones, which is cheaper and inexact; or `wait` until they are
            finished, and start no others meanwhile.

    Raises:
        UserError: the model is not one that slot attention computes exactly.
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
        self._next: LoadedPolicy | None = None  # waits for what runs
        self._waiting: deque[SequenceState] = deque()
        self._running: list[SequenceState] = []
        self._settled = 0  # slots whose cache lacks only their last token
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

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        if self._next is not None and not self._running:
            self._switch(self._next)
        if self._next is None:
            self._admit()
        if not self._running:
            return []
        rows = self._running
        layout = lay_out(
            self._cache, rows, self._settled, device=self._model.device, dtype=self._model.dtype
        )
        ids, logprobs = self._draw(self._forward(layout))
        for row, token, logprob in zip(rows, ids.tolist(), logprobs.tolist(), strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
        return self._finish()

    @property
    def version(self) -> int:
        return self._version

    def load(self, policy: LoadedPolicy) -> None:
        if misfit := self._shapes.misfit(policy.shapes):
            raise WeightsError(misfit)
        if self._on_new_weights == "wait" and self._running:
            self._next = policy
        else:
            self._switch(policy)

    def _switch(self, policy: LoadedPolicy) -> None:
        _copy_weights(self._model, policy.tensors())
        self._version = policy.number
        self._next = None
        if self._on_new_weights == "keep":
            for row in self._running:
                row.spans.append((policy.number, len(row.token_ids)))
            return
        self._waiting.extendleft(reversed(self._running))
        self._running = []
        self._settled = 0

    def close(self) -> None:
        """Nothing runs but in `step`."""

    def _drain(self) -> list[Completion]:
        written = []
        while self.active:
            written += self.step()
        return written

    def _admit(self) -> None:
        """Give free slots to those that wait, while their prompts and what was written of them fit
        `prefill_tokens`.
        """
        seen = set[PromptKey]()
        written = longest_prompt = longest_written = 0
        while self._waiting and len(self._running) < self._slots:
            row = self._waiting[0]
            if row.prompt not in seen and self._better_later():
                return
            longest_prompt = max(longest_prompt, len(row.request.prompt_ids))
            longest_written = max(longest_written, len(row.token_ids))
            written += bool(row.token_ids)
            if (
                seen
                and len(seen | {row.prompt}) * longest_prompt + written * longest_written
                > self._prefill_tokens
            ):
                return
            seen.add(row.prompt)
            self._give_slot(self._waiting.popleft())

    def _give_slot(self, row: SequenceState) -> None:
        if not row.spans or row.spans[-1][0] != self._version:
            row.spans.append((self._version, len(row.token_ids)))
        self._running.append(row)

    def _better_later(self) -> bool:
        """Whether the head of the queue shares its prompt with more than there are slots for, while
        few slots stand idle.

        Split, the prompt would be computed twice; waiting leaves at most an eighth of the slots
        empty for a step or so.
        """
        free = self._slots - len(self._running)
        if not self._running or free > self._slots // 8 or free >= len(self._waiting):
            return False
        return self._waiting[0].prompt == self._waiting[free].prompt

    def _space(self, request: GenerationRequest) -> Any:
        """Where the prompt's tokens lie in time, height and width [3, P]; None where the model
        counts tokens, or sees no image.
        """
        if not request.images or not has_spatial_positions(self._model):
            return None
        return prompt_positions(
            self._model, request.prompt_ids, [image.features for image in request.images]
        ).numpy()

    def _forward(self, layout: PackedRow) -> Tensor:
        """Logits [n, V] after the last token of each slot."""
        output = self._model(
            input_ids=layout.input_ids,
            position_ids=layout.position_ids,
            use_cache=False,
            logits_to_keep=layout.last,
            onstream_pass=layout.slots,
            **tensors_for(self._model, [image.features for image in layout.images]),
        )
        logits: Tensor = output.logits[0]
        return logits

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        requests = [row.request for row in self._running]
        sampling = [request.sampling for request in requests]
        uniform = uniforms(
            [request.seed & _UINT64 for request in requests],
            [len(row.token_ids) for row in self._running],
        )
        size = max(1, _SAMPLED_AT_ONCE // logits.shape[-1])
        cuts = [slice(start, start + size) for start in range(0, len(requests), size)]
        drawn = [draw(logits[cut], sampling[cut], uniform[cut]) for cut in cuts]
        return torch.cat([ids for ids, _ in drawn]), torch.cat([logprobs for _, logprobs in drawn])

    def _finish(self) -> list[Completion]:
        """Hand back what is finished, and move the last slots into the holes."""
        done = [slot for slot, row in enumerate(self._running) if self._reason(row) is not None]
        completions = [self._completion(self._running[slot]) for slot in done]
        left = len(self._running) - len(done)
        gone = set(done)
        holes = [slot for slot in done if slot < left]
        movers = [slot for slot in range(left, len(self._running)) if slot not in gone]
        if holes:
            self._cache.move(movers, holes, max(self._running[slot].length for slot in movers))
        for hole, mover in zip(holes, movers, strict=True):
            self._running[hole] = self._running[mover]
        del self._running[left:]
        self._settled = left
        return completions

    def _reason(self, row: SequenceState) -> FinishReason | None:
        if row.token_ids[-1] in self._stop:
            return "stop"
        return "length" if len(row.token_ids) >= row.request.max_tokens else None

    def _completion(self, row: SequenceState) -> Completion:
        ends = [start for _, start in row.spans[1:]] + [len(row.token_ids)]
        reason = self._reason(row)
        assert reason is not None
        return Completion(
            key=row.request.key,
            token_ids=np.array(row.token_ids, dtype=np.int32),
            logprobs=np.array(row.logprobs, dtype=np.float32),
            finish_reason=reason,
            version_spans=[
                VersionSpan(v, start, end)
                for (v, start), end in zip(row.spans, ends, strict=True)
                if end > start
            ],
        )

    @torch.inference_mode()
    def _require_exact(self) -> None:
        """Write a few tokens of two prompts, one of them shared, and compare with one plain forward
        pass each.
        """
        plain = text_config(self._model)._attn_implementation
        size = self._model.config.get_text_config().vocab_size
        prompts = [np.arange(1, count, dtype=np.int32) % size for count in (7, 7, 4)]
        stop = self._stop
        self._stop = frozenset()
        try:
            set_text_attention(self._model, ATTENTION)
            self.add(
                [
                    GenerationRequest(key, prompt, max_tokens=3, seed=key)
                    for key, prompt in enumerate(prompts)
                ]
            )
            written = self._drain()
        except (UnsupportedAttention, TypeError, ValueError, RuntimeError) as error:
            raise _cannot_serve(self._model, str(error).splitlines()[0]) from error
        finally:
            set_text_attention(self._model, plain)
        self._stop = stop
        if not self._cache.layers:
            raise _cannot_serve(
                self._model, "its attention does not go through the AttentionInterface"
            )
        gap = max(_gap(self._model, prompts[one.key], one) for one in written)
        if gap > (1e-3 if self._model.dtype == torch.float32 else 0.5):
            raise _cannot_serve(
                self._model,
                f"its logprobs differ by {gap:.2g} nats from those of a plain forward pass",
            )
        set_text_attention(self._model, ATTENTION)


def _gap(model: Any, prompt: Any, completion: Completion) -> float:
    """The largest difference, in nats, between `completion`'s logprobs and those of one plain
    forward pass.
    """
    ids = torch.from_numpy(np.concatenate([prompt, completion.token_ids]).astype(np.int64)).to(
        model.device
    )
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    plain = logits.float().log_softmax(dim=-1).gather(-1, ids[len(prompt) :, None])[:, 0]
    return float((plain.cpu() - torch.from_numpy(completion.logprobs)).abs().max())


def _cannot_serve(model: Any, why: str) -> UserError:
    return UserError(
        f"the generator cannot serve {type(model).__name__}: {why}",
        expected="full attention in every layer, through transformers' AttentionInterface, as in Qwen3, Qwen2 or Llama",
        next_step="Choose another `model.name`.",
    )


@torch.no_grad()
def _copy_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Overwrite the model's parameters; of those that share memory, those that `weights` has."""
    for name, tensor in model.state_dict().items():
        if name in weights:
            tensor.copy_(weights[name])
