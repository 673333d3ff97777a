"""Rules between the sizes of records and the room for them."""

from __future__ import annotations

from collections.abc import Iterator

from onstream.settings.devices import host_bytes
from onstream.settings.problems import SettingsProblem, problem_with
from onstream.settings.record_sizes import MIB, record_sizes, share_of_records
from onstream.settings.root import Settings
from onstream.settings.toml import shown_bytes


def room_for_the_window(settings: Settings) -> Iterator[SettingsProblem]:
    """The Redis that is started here holds all rollouts that may be under way."""
    given = settings.redis.max_memory
    if given is None or settings.redis.url is not None:
        return
    sizes = record_sizes(settings)
    room_bytes = given * MIB * share_of_records(settings)
    if room_bytes < sizes.window_bytes:
        names = ["redis.max_memory"]
        if settings.weights.transport == "redis":
            names.append("weights.max_share")
        yield problem_with(
            settings,
            names,
            f"room for {shown_bytes(sizes.window_bytes)} of records: {sizes.window:,} rollouts may "
            f"be under way, each of up to {shown_bytes(sizes.rollout_bytes)}",
            f"Set redis.max_memory = {sizes.max_memory_mib}, which it is where it is left out, or "
            "lower inference.sampling.max_completion, orchestrator.batch_size or "
            "orchestrator.max_off_policy_steps.",
        )


def size_warnings(settings: Settings) -> Iterator[str]:
    """Records at their longest that the memory of this machine does not hold."""
    if settings.redis.url is not None:
        return
    sizes = record_sizes(settings)
    if sizes.window_bytes > host_bytes():
        yield (
            f"Redis may take {shown_bytes(sizes.window_bytes)} for rollouts under way, if all are "
            f"as long as they may be, and this machine has {shown_bytes(host_bytes())}: set "
            "redis.max_memory to what it may take, and lower orchestrator.batch_size, "
            "orchestrator.max_off_policy_steps or inference.sampling.max_completion until it fits."
        )


SIZE_RULES = (room_for_the_window,)
