"""Turns of episodes: tokens, masks and versions by hand, and through a real engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from onstream.pipeline.record_codec import (
    check_episode,
    ids_array,
    logprobs_array,
    mask_array,
)
from onstream.pipeline.records import Episode, Ticket, VersionSpan
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Delivery
from onstream.settings.root import Settings
from onstream.workers.generator import policy_loader
from onstream.workers.generator.conversation import Conversation
from onstream.workers.generator.engines.base import Completion
from onstream.workers.generator.episode_turns import EpisodeTurns, Turn, tokens_of
from onstream.workers.generator.stage import Generator
from onstream.workers.tiny_models.character_tokenizer import character_tokenizer
from tests.workers.generator.templates import THINKING
from tests.workers.generator.test_stage import Announced, announced, settings_of

__all__ = ["announced"]  # a fixture

MORE = {"role": "user", "content": "Add: z"}


def ticket(min_policy_version: int = 0) -> Ticket:
    return Ticket(1, 0, 4, 0, 7, min_policy_version, ["act", "train"])


def episode(**fields: Any) -> Episode:
    return replace(
        Episode(
            ticket=ticket(),
            messages=[{"role": "user", "content": "Sort: cab"}],
            info={},
            tools=[],
            state=b"\xc0",
            temperature=1.0,
            route=["generate", "act", "train"],
        ),
        **fields,
    )


def turns_of(
    template: str | None = None, *, context: int | None = 96, longest: int = 64
) -> EpisodeTurns:
    tokenizer = character_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return EpisodeTurns(
        Conversation(tokenizer, {}),
        max_context=lambda: context,
        max_completion=8,
        max_episode=longest,
        text=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
    )


def written(text: str, version: int) -> Completion:
    """A completion that ends its turn."""
    ids = character_tokenizer()(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
    return Completion(
        0,
        np.array(ids, dtype=np.int32),
        np.linspace(-1, -0.5, len(ids), dtype=np.float32),
        "stop",
        [VersionSpan(version, 0, len(ids))],
    )


def next_turn(turns: EpisodeTurns, current: Episode) -> Turn:
    turn = turns.next(current)
    assert isinstance(turn, Turn)
    return turn


def played(turns: EpisodeTurns, *texts: str) -> Episode:
    """An episode of several turns, each under a version of its own, with `MORE` between them."""
    current = episode()
    for version, text in enumerate(texts, start=3):
        if current.turns:
            current = replace(current, messages=[*current.messages, MORE])
        current = turns.after(next_turn(turns, current), written(text, version))
    return current


def test_two_turns_by_hand() -> None:
    made = played(turns_of(), "abc", "abcz")
    check_episode(made)
    [sample] = made.samples
    tokenizer = character_tokenizer()
    between = "<|im_start|><|user|>Add: z<|im_end|><|im_start|><|assistant|>"
    text = f"abc<|im_end|>{between}abcz<|im_end|>"
    assert tokenizer.decode(ids_array(sample.completion_ids).tolist()) == text
    assert mask_array(sample.loss_mask).tolist() == [1] * 4 + [0] * 11 + [1] * 5
    assert sample.version_spans == [VersionSpan(3, 0, 4), VersionSpan(4, 15, 20)]
    logprobs = logprobs_array(sample.generator_logprobs)
    assert logprobs[4:15].tolist() == [0.0] * 11
    assert logprobs[[0, 3, 15, 19]].tolist() == [-1.0, -0.5, -1.0, -0.5]
    assert (sample.completion_text, made.turns, tokens_of(made)) == ("abcz", 2, 20)
    assert [message["role"] for message in made.messages] == [
        "user",
        "assistant",
        "user",
        "assistant",
    ]


def test_reasoning_that_is_dropped_begins_a_new_sample_of_the_same_episode() -> None:
    made = played(turns_of(THINKING), "abc", "abcz")
    assert len(made.samples) == 1
    rewriting = THINKING.replace("{{ message['content'] }}", "{{ message['content'][-3:] }}")
    made = played(turns_of(rewriting, longest=96), "so abc", "abcz")
    first, second = made.samples
    assert (first.completion_text, second.completion_text) == ("so abc", "abcz")
    assert mask_array(second.loss_mask).tolist() == [1] * 5
    assert second.version_spans == [VersionSpan(4, 0, 5)]
    assert "so" not in character_tokenizer().decode(ids_array(second.prompt_ids).tolist())
    assert tokens_of(made) == 7 + (len(second.prompt_ids) + len(second.completion_ids)) // 4


def test_a_turn_gets_what_is_left_of_the_episode_and_of_the_context() -> None:
    current = played(turns_of(), "abc")
    current = replace(current, messages=[*current.messages, MORE])
    prompt = len(next_turn(turns_of(), current).prompt_ids)
    assert next_turn(turns_of(longest=18), current).max_tokens == 18 - 4 - 11
    assert next_turn(turns_of(context=prompt + 2), current).max_tokens == 2
    assert next_turn(turns_of(context=None), current).max_tokens == 8
    assert turns_of(longest=15).next(current) == "tokens"
    assert turns_of(context=prompt).next(current) == "context"


@pytest.fixture
def generator(
    student_dir: Path,
    tmp_path: Path,
    bus: Bus,
    announced: Announced,
    monkeypatch: pytest.MonkeyPatch,
) -> Generator:
    """A stage that is set up and looks for a new version at every step."""
    monkeypatch.setattr(policy_loader, "POLL_S", 0.0)
    stage = Generator(with_environment(settings_of(student_dir, tmp_path)), bus, announced)
    announced.publish(0)
    stage.setup()
    return stage


def with_environment(settings: Settings) -> Settings:
    task = settings.task.model_copy(update={"environment": "sort-turns", "max_episode": 200})
    return settings.model_copy(update={"task": task})


def turned(stage: Generator, current: Episode) -> Episode:
    """What the generator makes of an episode."""
    outcomes = stage.handle([Delivery(b"1-0", 1, current, 1, 1, 1.0)])
    while not outcomes:
        outcomes = stage.handle([])
    assert isinstance(outcomes[0].record, Episode)
    return outcomes[0].record


def test_each_turn_has_the_version_and_the_logprobs_of_the_policy_that_wrote_it(
    generator: Generator,
    announced: Announced,
    other_weights: dict[str, torch.Tensor],
    plain_logprobs: Callable[..., Any],
) -> None:
    """A → B → A: the policy changes between two turns, and changes back."""
    current = played(turns_of(), "abc")  # by version 3, and not by this student
    for number, weights in ((4, other_weights), (5, None)):
        announced.publish(number, weights)
        current = replace(current, messages=[*current.messages, MORE])
        current = turned(generator, current)
        check_episode(current)
    weights_of = {4: other_weights, 5: None}
    # The second turn was cut off, without its end: the third begins a sample of its own.
    versions = [[span.version for span in sample.version_spans] for sample in current.samples]
    assert versions == [[3, 4], [5]]
    for sample in current.samples:
        prompt = ids_array(sample.prompt_ids)
        completion = ids_array(sample.completion_ids)
        ours = logprobs_array(sample.generator_logprobs)
        for span in (span for span in sample.version_spans if span.version in weights_of):
            every = plain_logprobs(prompt, completion, weights=weights_of[span.version])
            plain = every[range(len(completion)), completion]
            at = slice(span.start, span.end)
            assert np.abs(ours[at] - plain[at]).max() < 1e-5
            assert mask_array(sample.loss_mask)[at].all()


def test_an_episode_without_room_goes_on_without_a_turn_and_says_so(generator: Generator) -> None:
    current = played(turns_of(), "abc")
    far = {"role": "user", "content": "Add: " + "z" * 80}
    current = replace(current, messages=[*current.messages, far])
    after = turned(generator, current)
    assert (after.bound, after.turns, after.samples) == ("context", 1, current.samples)
    assert not generator.busy


def test_an_episode_that_begins_beyond_the_context_is_a_dead_letter(generator: Generator) -> None:
    current = episode(messages=[{"role": "user", "content": "z" * 100}])
    [outcome] = generator.handle([Delivery(b"1-0", 1, current, 1, 1, 1.0)])
    assert outcome.dead == "no room for a first turn: context"


def test_an_episode_waits_for_the_version_that_its_ticket_asks_for(
    generator: Generator, announced: Announced
) -> None:
    early = episode(ticket=ticket(min_policy_version=4))
    assert generator.handle([Delivery(b"1-0", 1, early, 1, 1, 1.0)]) == []
    assert not generator.busy
    announced.publish(4)
    generator.handle([])
    assert generator.busy
