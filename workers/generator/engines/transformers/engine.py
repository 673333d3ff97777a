"""The built-in engine: a transformers causal language model that writes many completions at once.

A request waits until it gets a slot; the first ones start one group after the other, so that they
do not all end in the same step. A step starts the prompts of new slots and writes one token of
every slot. Where its model's attention allows it, a step is one forward pass over one packed row;
otherwise it is one from the model's own cache, and one for each length of new prompts. New weights
send all that runs back to the head of the queue with what was written so far; the next step
computes it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from onstream.pipeline.models.loading import (
    load_model,
    resolve_device,
    resolve_dtype,
    text_config,
)
from onstream.pipeline.models.multimodal import has_spatial_positions, prompt_positions
from onstream.pipeline.models.trial import exact_context
from onstream.pipeline.models.weight_names import as_in_memory
from onstream.pipeline.models.weight_shapes import WeightShapes
from onstream.pipeline.telemetry import get_logger
from onstream.pipeline.weights import LoadedPolicy, WeightsError
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.engines.transformers.decoder_choice import choose_decoder, slots_for
from onstream.workers.generator.engines.transformers.decoding_step import PromptKey, SequenceState
from onstream.workers.generator.student import StudentModel, require_possible

# SplitMix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195).
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_DRAWN_AT_ONCE = 1 << 24
"""Elements of [rows, vocabulary] whose probabilities exist at once."""
_DRAWN_AT_ONCE_BY_CPU = 1 << 20
"""Few enough for a core's cache, and for malloc to keep their memory."""
SPREAD_FROM_TOKENS = 32
"""Completions that may be as long do not all start in the first step."""
_UINT64 = (1 << 64) - 1

log = get_logger()


def open_engine(student: StudentModel) -> TransformersEngine:
    """The engine for `student`, on the device and at the precision of its settings.

    Raises:
        UserError: there is no such model, or the engine cannot serve it.
    """
    settings = student.settings
    device = resolve_device(settings.deployment.device)
    dtype = resolve_dtype(settings.inference.dtype, device)
    model = load_model(student.name, dtype=dtype, device=device)
    hidden = model.get_input_embeddings().weight.shape[1]
    engine = TransformersEngine(
        model,
        student.stop_ids,
        slots=slots_for(settings, hidden, device),
        on_new_weights=settings.inference.on_new_weights,
    )
    if engine.own_cache_because:
        log.warning(
            "this model is decoded through its own cache: exact, and slower than from slots; "
            'inference.engine = "vllm" is faster where vLLM has the model',
            model=str(student.name),
            reason=engine.own_cache_because,
        )
    return engine


class TransformersEngine:
    """An `Engine` over a causal language model.

    `own_cache_because` is None where it decodes from slots, else the reason why it decodes from the
    cache that the model's own code makes.

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
        UserError: neither way computes this model exactly.
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
        # On a GPU a step takes as long with few rows as with many, so starting late gains nothing.
        self._spreads_starts = model.device.type == "cpu"
        self._context = exact_context(text_config(model))
        self._decoder, self.own_cache_because = choose_decoder(
            model, slots, self._context, prefill_tokens
        )

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
        ids, logprobs = self._draw(self._decoder.logits(self._running))
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
        _copy_weights(self._model, as_in_memory(self._model, policy.tensors()))
        self._version = policy.number
        self._next_policy = None
        if self._on_new_weights == "keep":
            for sequence in self._running:
                sequence.spans.append((policy.number, len(sequence.token_ids)))
            return
        self._waiting.extendleft(reversed(self._running))
        self._running = []
        self._decoder.forget()

    def _fill_slots(self) -> None:
        """Give free slots to those that wait, as far as `prefill_tokens` allows.

        What counts is the padded grid: prompts by the longest prompt, and completions that are
        computed again by the longest completion.
        """
        prompts = set[PromptKey]()
        completions = longest_prompt = longest_completion = 0
        while self._waiting and len(self._running) < self._slots:
            sequence = self._waiting[0]
            if sequence.prompt not in prompts and (self._better_later() or self._too_early()):
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

    def _too_early(self) -> bool:
        """Whether the next group should start later, so that it does not end with the others.

        On a CPU, until the first completion has ended, groups start as if all were to be as long as
        they may: evenly over that many steps. Where all do get that long, the stages after this one
        have work when a few groups are done, rather than all of it at once when everything is.
        """
        longest = self._waiting[0].request.max_tokens
        if not self._spreads_starts or not self._running or longest < SPREAD_FROM_TOKENS:
            return False
        if self._waiting[0].token_ids:  # it did start, under older weights
            return False
        steps = 1 + max(len(sequence.token_ids) for sequence in self._running)
        return len(self._running) * longest > min(self._slots, self.active) * steps

    def _space(self, request: GenerationRequest) -> Any:
        """Where the prompt's tokens lie in time, height and width [3, P].

        None where the model counts tokens, or the prompt has no image.
        """
        if not request.images or not has_spatial_positions(self._model):
            return None
        features = [image.features for image in request.images]
        return prompt_positions(self._model, request.prompt_ids, features).numpy()

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
        elements = _DRAWN_AT_ONCE_BY_CPU if logits.device.type == "cpu" else _DRAWN_AT_ONCE
        size = max(1, elements // logits.shape[-1])
        for start in range(0, len(requests), size):
            part = slice(start, start + size)
            part_ids, part_logprobs = draw(logits[part], temperatures[part], uniform[part])
            ids.append(part_ids)
            logprobs.append(part_logprobs)
        return torch.cat(ids), torch.cat(logprobs)

    def _finish(self) -> list[Completion]:
        """Hand back what is finished."""
        completions = []
        finished = []
        for place, row in enumerate(self._running):
            if reason := row.finish_reason(self._stop):
                finished.append(place)
                completions.append(row.completion(reason))
                # What may have one token alone says nothing about the length of others.
                self._spreads_starts &= row.request.max_tokens == 1
        self._running = self._decoder.without(self._running, finished)
        return completions


@torch.no_grad()
def _copy_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Overwrite the model's parameters; of those that share memory, those that `weights` has."""
    for name, tensor in model.state_dict().items():
        if name in weights:
            tensor.copy_(weights[name])


BLOCK = 256
"""Tokens of a vocabulary whose probabilities are summed first, when one is drawn."""


def uniforms(seeds: npt.ArrayLike, positions: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Draws in [0, 1), one for each (seed, position) pair.

    A hash rather than a random generator: there is no state that rows could share.

    Args:
        seeds: uint64 [n], the rollouts' seeds.
        positions: [n], the index of the token to draw in its completion.
    """
    stream = _mixed(np.asarray(seeds, dtype=np.uint64) + _INCREMENT)
    bits = _mixed(stream + np.asarray(positions, dtype=np.uint64) * _INCREMENT)
    # 52 bits, so that u·total stays below total in float64 and never falls past the last token.
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def draw(
    logits: Tensor, temperatures: Sequence[float], uniform: npt.NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF, and its logprob under the distribution it was drawn from.

    Args:
        logits: [n, V], any float type; computed in float32.
        temperatures: [n]; 0 takes the likeliest token, and gives its logprob at temperature 1.
        uniform: [n] draws in [0, 1).

    Returns:
        Token ids int64 [n] and logprobs float32 [n], in nats.

    Raises:
        FloatingPointError: a row's logits are not numbers: broken weights, or an overflow.
    """
    greedy = [temperature == 0 for temperature in temperatures]
    divisors = [temperature or 1.0 for temperature in temperatures]
    scaled = logits.float()
    if any(divisor != 1.0 for divisor in divisors):
        scaled = scaled / torch.tensor(divisors, device=logits.device)[:, None]
    largest = scaled.amax(dim=-1, keepdim=True)
    weights = (scaled - largest).exp_()
    ids, total = _inverse_cdf(weights, torch.from_numpy(uniform).to(logits.device)[:, None])
    if any(greedy):
        likeliest = weights.argmax(dim=-1, keepdim=True)
        ids = torch.where(torch.tensor(greedy, device=logits.device)[:, None], likeliest, ids)
    logprobs = scaled.gather(-1, ids) - largest - total.log().float()
    return ids[:, 0], logprobs[:, 0]


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The token [n, 1] at which the cumulative weight passes the share `uniform` [n, 1] of all.

    First the block of tokens is found, then the token in it, so that the cumulative sum is one over
    blocks. It is in float64: over a vocabulary of 150k tokens that of float32 is off by more than
    the probability of its rare tokens.

    Args:
        weights: [n, V], proportional to the probabilities; the largest of a row is 1.
        uniform: [n, 1] draws in [0, 1).

    Returns:
        The tokens, and the sum of each row's weights [n, 1] in float64.

    Raises:
        FloatingPointError: a row's weights are not numbers.
    """
    rows, vocabulary = weights.shape
    if ragged := -vocabulary % BLOCK:
        weights = nn.functional.pad(weights, (0, ragged))
    blocks = weights.view(rows, -1, BLOCK)
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    total = ends[:, -1:]
    if not total.isfinite().all():
        raise FloatingPointError(
            "the model's logits are not finite; "
            "its weights are broken, or overflow at this precision"
        )
    target = uniform * total
    block = torch.searchsorted(ends, target, right=True)
    before = nn.functional.pad(ends, (1, 0)).gather(1, block)
    share = (target - before) / (ends.gather(1, block) - before)
    inside = blocks[torch.arange(rows, device=weights.device), block[:, 0]]
    inside = inside.cumsum(-1, dtype=torch.float64)
    # Under 1, whatever was rounded, so that it never falls past the block's last token.
    within = torch.searchsorted(inside, share.clamp(max=1 - 2**-52) * inside[:, -1:], right=True)
    return block * BLOCK + within, total


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIERS[0]
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIERS[1]
    return x ^ (x >> np.uint64(31))
