"""Stops a generator whose engine does not compute the policy that the trainer published."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.models.loading import resolve_device, resolve_dtype
from onstream.pipeline.records import Ids, Logprobs, PolicyVersion, Probe, ids_array, logprobs_array
from onstream.pipeline.telemetry import get_logger
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import Completion, Engine, GenerationRequest

EXACT = 1e-3
ROUNDED = 0.3
"""The largest difference, in nats, that two right programs have in float32, and in bfloat16, with
room: vLLM and transformers on the same weights were measured to differ by at most 1.3e-5 and 0.14
over 10,000 tokens."""

log = get_logger()


@dataclass(frozen=True)
class ProbeComparison:
    """What the engine says after a prompt, its likeliest token with its logprob, and the trainer's
    logprob of that token.

    `below` says that the token is none of those that the trainer sent, so that its logprob is at
    most this. `difference` is in nats.
    """

    token: int
    engine_logprob: float
    trainer_logprob: float
    below: bool
    difference: float


def compare(token: int, logprob: float, top_ids: Ids, top_logprobs: Logprobs) -> ProbeComparison:
    """The engine's likeliest `token` beside the trainer's `top_ids` [k], likeliest first, with
    their logprobs [k].

    No token is likelier to the engine than its own choice, so neither is the trainer's: where the
    trainer is surer of its choice than the engine of any, that is a difference too.
    """
    at = np.flatnonzero(top_ids == token)
    trainer = float(top_logprobs[at[0] if len(at) else -1])
    difference = max(abs(logprob - trainer), float(top_logprobs[0]) - logprob)
    return ProbeComparison(token, logprob, trainer, below=not len(at), difference=difference)


class Guard:
    """Puts the prompts of a version's probe to the engine, as ordinary requests among all others,
    and compares the answers.

    An ordinary request reads what others left in a prefix cache, so blocks kept from an older
    version show, as do weights that were loaded in part. Every replica is asked.

    Args:
        interval: the first version loaded is asked, then one every so many; 0: none.
        tolerance: the largest difference, in nats.
        mixes: whether the engine goes on with what older weights computed of a prompt; an answer
            that an update fell into then says nothing.

    `checked` is the version of the last answers, all of which were right; None before.
    """

    def __init__(
        self, engine: Engine, *, interval: int, tolerance: float, mixes: bool = False
    ) -> None:
        self._engine = engine
        self._interval = interval
        self._tolerance = tolerance
        self._mixes = mixes
        self._loaded: PolicyVersion | None = None
        self._versions: dict[int, PolicyVersion] = {}  # that an answer under way may come from
        self._asked: dict[
            int, tuple[int, int]
        ] = {}  # by the request's key, the numbers of the prompt and of the replica
        self.checked: int | None = None
        self._last_key = 0
        # of the answers to one probe
        self._oldest = 0
        self._largest = 0.0

    def look(self, loaded: PolicyVersion | None) -> None:
        """Ask about `loaded`, the version that was loaded last, if it is due and the engine writes
        with it.
        """
        if not self._interval or loaded is None:
            return
        if loaded is not self._loaded:
            self._turn_to(loaded)
        due = self.checked is None or loaded.number - self.checked >= self._interval
        if (
            due
            and not self._asked
            and loaded.probe is not None
            and self._engine.version == loaded.number
        ):
            self._ask(loaded.probe, loaded.number)

    def take(self, completions: Iterable[Completion]) -> list[Completion]:
        """Judge those of `completions` that answer the guard; returns the others.

        Raises:
            UserError: the engine computes another policy, or names the wrong one.
        """
        others = []
        for completion in completions:
            if completion.key >= 0:
                others.append(completion)
            elif asked := self._asked.pop(completion.key, None):
                self._judge(completion, *asked)
        return others

    def _turn_to(self, loaded: PolicyVersion) -> None:
        replaced = self._loaded is not None and loaded.number <= self._loaded.number
        if replaced or self._mixes:
            self._asked.clear()
        if replaced:
            self.checked = None
        if not self._asked:
            self._versions.clear()
        self._versions[loaded.number] = self._loaded = loaded

    def _ask(self, probe: Probe, version: int) -> None:
        prompts = [ids_array(prompt) for prompt in probe.prompts]
        room = self._engine.max_context
        if room is not None and max(map(len, prompts)) >= room:
            raise _too_long(max(map(len, prompts)), room)
        requests = []
        for replica in range(self._engine.replicas):
            for number, prompt in enumerate(prompts):
                self._last_key -= 1  # the stage's own keys are positive
                self._asked[self._last_key] = number, replica
                requests.append(
                    GenerationRequest(
                        self._last_key,
                        prompt,
                        1,
                        seed=0,
                        temperature=0.0,
                        replica=replica,
                    )
                )
        self._oldest = version
        self._largest = 0.0
        self._engine.add(requests)

    def _judge(self, completion: Completion, prompt: int, replica: int) -> None:
        named = completion.version_spans[0].version if completion.version_spans else None
        policy = self._versions.get(-1 if named is None else named)
        if policy is None:
            raise _misnamed(named, list(self._versions))
        if policy.probe is None:  # the trainer has been started anew without a guard
            return
        answer = compare(
            int(completion.token_ids[0]),
            float(completion.logprobs[0]),
            *_expected(policy.probe, prompt),
        )
        if not answer.difference <= self._tolerance:
            raise _mismatch(
                answer,
                policy.number,
                prompt,
                replica if self._engine.replicas > 1 else None,
                self._tolerance,
            )
        self._oldest, self._largest = (
            min(self._oldest, policy.number),
            max(self._largest, answer.difference),
        )
        if not self._asked:
            self.checked = self._oldest
            log.info(
                "the engine computes the trainer's policy",
                policy_version=self._oldest,
                largest_difference=self._largest,
            )


def tolerance_of(settings: Settings) -> float:
    """`inference.guard.tolerance`, or what follows from the coarser of the engine's precision and
    the trainer's.
    """
    if settings.inference.guard.tolerance is not None:
        return settings.inference.guard.tolerance
    device = resolve_device(settings.deployment.device)
    dtypes = {
        resolve_dtype(section.dtype, device) for section in (settings.inference, settings.trainer)
    }
    return EXACT if dtypes == {torch.float32} else ROUNDED


def _expected(probe: Probe, prompt: int) -> tuple[Ids, Logprobs]:
    """The trainer's likeliest ids [k] after a prompt of the probe, and their logprobs [k]."""
    shape = len(probe.prompts), -1
    return ids_array(probe.top_ids).reshape(shape)[prompt], logprobs_array(
        probe.top_logprobs
    ).reshape(shape)[prompt]


def _mismatch(
    answer: ProbeComparison, version: int, prompt: int, replica: int | None, tolerance: float
) -> UserError:
    where = f"prompt {prompt} of the probe" + ("" if replica is None else f" (replica {replica})")
    trainer = f"{'less than ' if answer.below else ''}{answer.trainer_logprob:.6f}"
    return UserError(
        f"under policy version {version} the engine gives token {answer.token} after {where} the logprob {answer.engine_logprob:.6f}, "
        f"the trainer {trainer}: they differ by {answer.difference:.6f} nats",
        expected=f"at most {tolerance:g} (inference.guard.tolerance): the engine is to compute the weights that the trainer published",
        next_step="Do not use what this engine writes: an update did not reach all of it. Start the generator again, update the engine, or "
        'set inference.engine = "transformers". If the two differ by rounding alone (quantised weights, say), raise the tolerance.',
        exit=Exit.REFUSED,
    )


def _misnamed(named: int | None, loaded: Sequence[int]) -> UserError:
    return UserError(
        f"the engine says that policy version {named} wrote a token, after {' and '.join(map(str, loaded))} had been loaded",
        expected="the version whose weights wrote it",
        next_step="Do not use what this engine writes: staleness would be counted wrongly. Update the engine, or set "
        'inference.engine = "transformers".',
        exit=Exit.REFUSED,
    )


def _too_long(tokens: int, context: int) -> UserError:
    return UserError(
        f"the trainer's probe has prompts of {tokens} tokens; this engine takes {context}, the answer included",
        expected=f"at most {context - 1}",
        next_step=f"Set inference.guard.tokens to at most {context - 1} for the trainer, or raise inference.max_model_len here.",
    )
