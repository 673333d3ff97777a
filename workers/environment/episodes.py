"""How an episode begins, goes on and ends, by what the environment plays.

Pure: records and what was played in, records out.
"""

from __future__ import annotations

import hashlib
from typing import Any

from onstream.pipeline.records import Episode, Rollout, Ticket
from onstream.pipeline.tasks import Problem
from onstream.workers.environment.messages import Played, StartRequest, StepRequest


def start_request(problem: Problem, seed: int) -> StartRequest:
    """What starts an episode on `problem`."""
    return StartRequest(problem.messages, problem.info, seed)


def step_request(episode: Episode) -> StepRequest:
    """What answers the student's last turn in `episode`."""
    return StepRequest(episode.state, episode.messages[-1])


def begun(ticket: Ticket, info: dict[str, Any], played: Played, temperature: float) -> Episode:
    """The episode of `ticket`, as the environment started it."""
    return Episode(
        ticket=ticket,
        messages=played.messages,
        info=info,
        tools=played.tools,
        state=played.state,
        temperature=temperature,
        route=["generate", *ticket.route],
    )


def after_step(episode: Episode, played: Played, max_turns: int) -> Episode | Rollout:
    """What becomes of `episode` after what was `played`: another turn, or its end.

    It ends where the environment says so, fails or was stopped; where the student's turn was cut
    off; and where it was the last of `max_turns`.
    """
    if played.fault is not None:
        return rollout_of(episode, unscored=f"the environment: {played.fault}")
    if played.ended_by:
        episode.reward = 0.0
        episode.reward_parts = {played.ended_by: 1.0}
        return rollout_of(episode)
    episode.reward += played.reward
    parts = episode.reward_parts
    episode.reward_parts = parts | {
        name: parts.get(name, 0.0) + value for name, value in played.parts.items()
    }
    if played.done or episode.finish_reason == "length":
        return rollout_of(episode)
    if episode.turns >= max_turns:
        episode.bound = "turns"
        return rollout_of(episode)
    episode.messages = [*episode.messages, *played.messages]
    episode.state = played.state
    episode.route = ["generate", *episode.route]
    return episode


def rollout_of(episode: Episode, *, unscored: str | None = None) -> Rollout:
    """The rollout that `episode` ends as.

    Its messages are what came before the student's last turn, whose text is in the last sample.
    Without a reward where the environment failed.
    """
    roles = [message["role"] for message in episode.messages]
    last = len(roles) - 1 - roles[::-1].index("assistant")
    parts = episode.reward_parts
    if episode.bound:
        parts = {**parts, f"out_of_{episode.bound}": 1.0}
    ticket = episode.ticket
    return Rollout(
        number=ticket.number,
        group=ticket.group,
        group_size=ticket.group_size,
        index=ticket.index,
        messages=episode.messages[:last],
        info=episode.info,
        samples=episode.samples,
        temperature=episode.temperature,
        finish_reason="length" if episode.bound else episode.finish_reason,
        route=episode.route,
        timings=episode.timings,
        reward=None if unscored else episode.reward,
        reward_parts=parts,
        unscored=unscored,
    )


def episode_seed(run_seed: int | str, index: int) -> int:
    """63 bits for the episodes on problem `index`, the same for all members of a group."""
    digest = hashlib.blake2b(f"{run_seed}/episode/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def held_out_seed(index: int) -> int:
    """That of the episode on the held-out problem `index`, the same in every run."""
    return episode_seed("held-out", index)
