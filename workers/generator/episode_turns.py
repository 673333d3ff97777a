"""A turn of an episode: what the student reads, and what becomes of what it writes.

Pure but for the tokenizer: episodes in, requests and episodes out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from onstream.pipeline.record_codec import ids_array, ids_bytes, logprobs_bytes, mask_bytes
from onstream.pipeline.records import Bound, Episode, Ids, Sample, VersionSpan
from onstream.settings.root import Settings
from onstream.workers.generator.conversation import Conversation
from onstream.workers.generator.engines.base import Completion
from onstream.workers.generator.student import Student


@dataclass(frozen=True)
class Turn:
    """The next turn of `episode`: the student reads `prompt_ids`, and writes up to `max_tokens`.

    `between` are the last ids of the prompt, those that follow the last sample's; None where the
    turn begins a sample of its own.
    """

    episode: Episode
    prompt_ids: Ids
    between: Ids | None
    max_tokens: int


class EpisodeTurns:
    """Prepares turns of at most `max_completion` tokens, in episodes of at most `max_episode`.

    `max_context` gives the most tokens that the engine takes now; None: no bound. `text` is a
    completion as text, without the token that ended it.
    """

    def __init__(
        self,
        conversation: Conversation,
        *,
        max_context: Callable[[], int | None],
        max_completion: int,
        max_episode: int,
        text: Callable[[Ids], str],
    ) -> None:
        self._conversation = conversation
        self._max_context = max_context
        self._max_completion = max_completion
        self._max_episode = max_episode
        self._text = text
        self._tools_checked = False

    def check(self) -> None:
        """Check that the template renders episodes.

        Raises:
            UserError: it does not.
        """
        self._conversation.require_turns()

    def next(self, episode: Episode) -> Turn | Bound:
        """The next turn of `episode`, or why there is no room for it.

        Raises:
            UserError: the episode has tools, which the student's template cannot render.
        """
        if episode.tools and not self._tools_checked:
            self._conversation.require_tools()
            self._tools_checked = True
        prompt_ids, between = self._prompt(episode)
        new = len(prompt_ids if between is None else between)
        # What the first prompt takes does not count: a problem is as long as it is.
        left = self._max_episode - tokens_of(episode) - (new if episode.samples else 0)
        context = self._max_context()
        room = self._max_completion if context is None else context - len(prompt_ids)
        if room < 1:
            return "context"
        if left < 1:
            return "tokens"
        return Turn(episode, prompt_ids, between, min(self._max_completion, room, left))

    def _prompt(self, episode: Episode) -> tuple[Ids, Ids | None]:
        """What the student reads, and what of it follows the ids of the last sample."""
        if episode.samples:
            written = ids_of(episode.samples[-1])
            end = int(written[-1])
            between = self._conversation.between(episode.messages, episode.tools, end)
            if between is not None:
                return np.concatenate([written, between]), between
        return self._conversation.prompt(episode.messages, episode.tools), None

    def after(self, turn: Turn, completion: Completion) -> Episode:
        """The episode with what the student wrote in its `turn`."""
        episode = turn.episode
        text = self._text(completion.token_ids)
        if turn.between is None:
            samples = [*episode.samples, new_sample(turn.prompt_ids, completion, text)]
        else:
            last = continued(episode.samples[-1], turn.between, completion, text)
            samples = [*episode.samples[:-1], last]
        return msgspec.structs.replace(
            episode,
            samples=samples,
            messages=[*episode.messages, {"role": "assistant", "content": text}],
            turns=episode.turns + 1,
            finish_reason=completion.finish_reason,
        )


def episode_turns(student: Student, settings: Settings) -> EpisodeTurns:
    """What prepares the turns of `student` in a run of `settings`.

    Raises:
        UserError: the run has episodes, and the student's chat template does not render them.
    """
    turns = EpisodeTurns(
        Conversation(student.model.tokenizer, student.model.template_arguments),
        max_context=lambda: student.engine.max_context,
        max_completion=settings.inference.sampling.max_completion,
        max_episode=settings.task.max_episode,
        text=student.text,
    )
    if settings.task.environment is not None:
        turns.check()
    return turns


def new_sample(prompt_ids: Ids, completion: Completion, text: str) -> Sample:
    """The sample that one completion makes."""
    return Sample(
        prompt_ids=ids_bytes(prompt_ids),
        completion_ids=ids_bytes(completion.token_ids),
        loss_mask=mask_bytes([1] * len(completion.token_ids)),
        generator_logprobs=logprobs_bytes(completion.logprobs),
        version_spans=completion.version_spans,
        completion_text=text,
    )


def continued(sample: Sample, between: Ids, completion: Completion, text: str) -> Sample:
    """`sample` with a further turn. What lies between has mask 0, no logprob (zeros that nothing
    reads) and no version.
    """
    start = len(sample.loss_mask) + len(between)
    spans = [
        VersionSpan(span.version, start + span.start, start + span.end)
        for span in completion.version_spans
    ]
    return msgspec.structs.replace(
        sample,
        completion_ids=sample.completion_ids + ids_bytes(between) + ids_bytes(completion.token_ids),
        loss_mask=sample.loss_mask + bytes(len(between)) + b"\1" * len(completion.token_ids),
        generator_logprobs=sample.generator_logprobs
        + bytes(4 * len(between))
        + logprobs_bytes(completion.logprobs),
        version_spans=[*sample.version_spans, *spans],
        completion_text=text,
    )


def ids_of(sample: Sample) -> Ids:
    """The prompt and the completion of `sample`."""
    return np.concatenate([ids_array(sample.prompt_ids), ids_array(sample.completion_ids)])


def tokens_of(episode: Episode) -> int:
    """The tokens of `episode` after its first prompt, in all of its samples."""
    samples = episode.samples
    total = sum(len(one.prompt_ids) + len(one.completion_ids) for one in samples)
    return (total - len(samples[0].prompt_ids)) // 4 if samples else 0


def turn_seed(ticket_seed: int, turn: int) -> int:
    """63 bits for the draws of a turn; neighbours share nothing."""
    digest = hashlib.blake2b(f"{ticket_seed}/turn/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
