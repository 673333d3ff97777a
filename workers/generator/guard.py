"""Stops a generator whose engine does not compute the policy that the trainer published."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.models.loading import resolve_device, resolve_dtype
from onstream.pipeline.record_codec import ids_array, logprobs_array
from onstream.pipeline.records import Ids, Logprobs, PolicyVersion, Probe
from onstream.pipeline.telemetry import get_logger
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import Completion, Engine, GenerationRequest

FLOAT32_TOLERANCE = 1e-3
BFLOAT16_TOLERANCE = 0.3
"""The largest differences, in nats, that two correct programs have, with a margin.

vLLM and transformers on the same weights were measured to differ by at most 1.3e-5 in float32 and
0.14 in bfloat16, over 10,000 tokens.
"""

log = get_logger()


@dataclass(frozen=True)
class ProbeComparison:
    """The engine's likeliest token after a prompt, beside the trainer's logprob of that token.

    Args:
        token: the engine's likeliest.
        engine_logprob: its logprob by the engine, in nats.
        trainer_logprob: its logprob by the trainer, in nats; if `below`, it is less than this.
        below: whether the token is outside the few that the trainer sent.
        difference: in nats.
    """

    token: int
    engine_logprob: float
    trainer_logprob: float
    below: bool
    difference: float


def compare(token: int, logprob: float, top_ids: Ids, top_logprobs: Logprobs) -> ProbeComparison:
    """The engine's likeliest `token` beside the trainer's likeliest ones.

    To the engine no token is likelier than `token`. So if the trainer's likeliest token has a
    higher logprob than `token` has with the engine, that is a difference too.

    Args:
        token: the engine's likeliest.
        logprob: the engine's, in nats.
        top_ids: [k], the trainer's likeliest tokens, the likeliest first.
        top_logprobs: [k], their logprobs, in nats.
    """
    places = np.flatnonzero(top_ids == token)
    below = not len(places)
    trainer = float(top_logprobs[-1 if below else places[0]])
    difference = max(abs(logprob - trainer), float(top_logprobs[0]) - logprob)
    return ProbeComparison(token, logprob, trainer, below, difference)


class Guard:
    """Checks with the probe of a version that the engine computes the trainer's policy.

    The probe's prompts go to the engine as ordinary requests among all others. So they read what
    others left in a prefix cache, and blocks kept from an older version show, as do weights that
    were loaded in part. Every replica is asked.

    Args:
        engine: writes the answers.
        interval: the first version loaded is checked, then one every so many; 0: no other.
        tolerance: the largest difference, in nats.
        family: of the model, such as qwen3; for messages.
        mixes: whether the engine goes on with what older weights computed of a prompt. An answer
            during which weights were loaded then says nothing.

    `checked` is the version of the last answers, all of which were right; None before.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        interval: int,
        tolerance: float,
        family: str,
        mixes: bool = False,
    ) -> None:
        self._engine = engine
        self._interval = interval
        self._tolerance = tolerance
        self._mixes = mixes
        self._family = family
        self._loaded: PolicyVersion | None = None
        # The versions that an answer in flight may come from.
        self._versions: dict[int, PolicyVersion] = {}
        # In flight, by the request's key: the numbers of the prompt and of the replica.
        self._in_flight: dict[int, tuple[int, int]] = {}
        self._last_key = 0
        # Of the answers to the current probe: the oldest version, and the largest difference.
        self._oldest = 0
        self._largest = 0.0
        self.checked: int | None = None

    def look(self, loaded: PolicyVersion | None) -> None:
        """Ask about `loaded`, the version loaded last, if a check of it is due.

        It is not before the engine writes with that version.
        """
        if loaded is None:
            return
        if loaded is not self._loaded:
            self._turn_to(loaded)
        ready = not self._in_flight and self._engine.version == loaded.number
        if ready and loaded.probe is not None and self._is_due(loaded.number):
            self._ask(loaded.probe, loaded.number)

    def take(self, completions: Iterable[Completion]) -> list[Completion]:
        """Check those of `completions` that answer the guard; returns the others.

        Raises:
            UserError: the engine computes another policy, or names another version.
        """
        others = []
        for completion in completions:
            if completion.key >= 0:
                others.append(completion)
            elif in_flight := self._in_flight.pop(completion.key, None):
                self._check(completion, *in_flight)
        return others

    def _is_due(self, version: int) -> bool:
        if self.checked is None:
            return True
        return self._interval > 0 and version - self.checked >= self._interval

    def _turn_to(self, loaded: PolicyVersion) -> None:
        # The trainer went back to a checkpoint: other weights have the numbers after it.
        replaced = self._loaded is not None and loaded.number <= self._loaded.number
        if replaced or self._mixes:
            self._in_flight.clear()
        if replaced:
            self.checked = None
        if not self._in_flight:
            self._versions.clear()
        self._loaded = loaded
        self._versions[loaded.number] = loaded

    def _ask(self, probe: Probe, version: int) -> None:
        prompts = [ids_array(prompt) for prompt in probe.prompts]
        longest = max(map(len, prompts))
        context = self._engine.max_context
        if context is not None and longest >= context:
            raise _too_long(longest, context)
        requests = []
        for replica in range(self._engine.replicas):
            for number, prompt in enumerate(prompts):
                requests.append(self._request(number, prompt, replica))
        self._oldest = version
        self._largest = 0.0
        self._engine.add(requests)

    def _request(self, number: int, prompt: Ids, replica: int) -> GenerationRequest:
        self._last_key -= 1  # the stage's own keys are positive
        self._in_flight[self._last_key] = (number, replica)
        return GenerationRequest(
            self._last_key, prompt, max_tokens=1, seed=0, temperature=0.0, replica=replica
        )

    def _check(self, completion: Completion, prompt: int, replica: int) -> None:
        spans = completion.version_spans
        named = spans[0].version if spans else None
        policy = None if named is None else self._versions.get(named)
        if policy is None:
            raise _misnamed(named, list(self._versions))
        if policy.probe is None:  # an older trainer announced it
            return
        comparison = compare(
            int(completion.token_ids[0]),
            float(completion.logprobs[0]),
            *_expected(policy.probe, prompt),
        )
        # Written so that a difference of NaN is refused too.
        if not comparison.difference <= self._tolerance:
            where = f"prompt {prompt} of the probe"
            if self._engine.replicas > 1:
                where += f" (replica {replica})"
            raise _mismatch(comparison, policy.number, where, self._family, self._tolerance)
        self._oldest = min(self._oldest, policy.number)
        self._largest = max(self._largest, comparison.difference)
        if not self._in_flight:
            self.checked = self._oldest
            log.info(
                "the engine computes the trainer's policy",
                policy_version=self._oldest,
                largest_difference=self._largest,
            )


def tolerance_of(settings: Settings) -> float:
    """`inference.guard.tolerance`, or the one of the coarser precision of engine and trainer."""
    if settings.inference.guard.tolerance is not None:
        return settings.inference.guard.tolerance
    device = resolve_device(settings.deployment.device)
    dtypes = {
        resolve_dtype(settings.inference.dtype, device),
        resolve_dtype(settings.trainer.dtype, device),
    }
    return FLOAT32_TOLERANCE if dtypes == {torch.float32} else BFLOAT16_TOLERANCE


def _expected(probe: Probe, prompt: int) -> tuple[Ids, Logprobs]:
    """The trainer's likeliest ids [k] after a prompt of the probe, and their logprobs [k]."""
    shape = len(probe.prompts), -1
    ids = ids_array(probe.top_ids).reshape(shape)[prompt]
    logprobs = logprobs_array(probe.top_logprobs).reshape(shape)[prompt]
    return ids, logprobs


def _mismatch(
    comparison: ProbeComparison, version: int, where: str, family: str, tolerance: float
) -> UserError:
    less_than = "less than " if comparison.below else ""
    return UserError(
        f"under policy version {version} the engine gives token {comparison.token} after {where} "
        f"the logprob {comparison.engine_logprob:.6f}, "
        f"the trainer {less_than}{comparison.trainer_logprob:.6f}: "
        f"they differ by {comparison.difference:.6f} nats",
        expected=f"at most {tolerance:g} (inference.guard.tolerance): "
        "the engine is to compute the weights that the trainer published",
        next_step="Do not use what this engine writes: an update did not reach all of it, or it "
        f"computes {family} models in another way. Start the generator again, update the engine, "
        'or set inference.engine = "transformers". If the two differ by rounding alone '
        "(quantised weights, say), raise the tolerance.",
        exit=Exit.REFUSED,
    )


def _misnamed(named: int | None, loaded: Sequence[int]) -> UserError:
    return UserError(
        f"the engine says that policy version {named} wrote a token, "
        f"after {' and '.join(map(str, loaded))} had been loaded",
        expected="the version whose weights wrote it",
        next_step="Do not use what this engine writes: staleness would be counted wrongly. "
        'Update the engine, or set inference.engine = "transformers".',
        exit=Exit.REFUSED,
    )


def _too_long(tokens: int, context: int) -> UserError:
    most = context - 1
    return UserError(
        f"the trainer's probe has prompts of {tokens} tokens; "
        f"this engine takes {context}, the answer included",
        expected=f"at most {most}",
        next_step=f"Set inference.guard.tokens to at most {most} for the trainer, "
        "or raise inference.max_model_len here.",
    )
