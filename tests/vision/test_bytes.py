"""What a group over one large image costs: its bytes in Redis once, until its last rollout has
settled; its name in every record.
"""

from __future__ import annotations

from pathlib import Path

from onstream.pipeline.loop import Worker
from onstream.pipeline.record_codec import decode_work
from onstream.pipeline.records import Rollout
from onstream.pipeline.redis.bus import Bus
from onstream.workers.teacher.stage import Teacher
from tests.vision.conftest import Tiny, noise
from tests.vision.test_stages import generate, settings_of, shows

GROUP = 16
NAMED_BYTES = 300
"""What a record may have more for an image, beside the 4 bytes of each of its tokens: its digest
twice, and the parts of its message.
"""


def memory(bus: Bus) -> int:
    """Bytes that Redis spends on all keys of the run."""
    return sum(
        int(bus.connection.ask("MEMORY", "USAGE", key, "SAMPLES", 0))
        for key in bus.connection.ask("KEYS", f"{{onstream:{bus.run}}}:*")
    )


def image_bytes(bus: Bus) -> int:
    """Bytes of images, counted in Redis itself."""
    return sum(
        int(bus.connection.ask("HSTRLEN", bus.keys.images, digest))
        for digest in bus.connection.ask("HKEYS", bus.keys.images)
    )


def test_sixteen_rollouts_over_a_megapixel_add_it_to_redis_once_until_the_last_has_settled(
    bus: Bus, tiny: Tiny, tmp_path: Path
) -> None:
    picture = noise(1, 1024, 1024)  # does not compress: 3 MB
    settings = settings_of(
        tiny,
        tmp_path,
        [shows(picture.data_url)],
        orchestrator={"group_size": GROUP, "batch_size": GROUP},
    )
    before = memory(bus)
    generate(bus, settings, tiny, problems=1)
    generated = memory(bus)
    held = image_bytes(bus)
    assert held == len(picture.data)
    assert (
        held < generated - before < 1.3 * held
    )  # the allocator rounds large values up by less than a quarter

    teacher = Worker(Teacher(settings, bus), bus, settings.delivery, block_s=0.05)
    teacher.stage.setup()
    while bus.state.backlog()["score"]:
        teacher.turn()
        assert image_bytes(bus) == len(picture.data)
    teacher.stage.close(finished=False)

    assert bus.lease.current is not None
    entries = bus.streams.read("train", 100)
    assert len(entries) == GROUP
    bus.lease.acknowledge(bus.lease.current, {entry.id: entry.number for entry in entries[:-1]})
    but_one = memory(bus)
    assert image_bytes(bus) == len(picture.data)
    bus.lease.acknowledge(bus.lease.current, {entry.id: entry.number for entry in entries[-1:]})
    print(
        f"an image of {held:,} bytes; memory {before:,} before, {generated:,} generated, "
        f"{but_one:,} settled but one, {memory(bus):,} after"
    )
    assert memory(bus) - before < 10_000
    assert (
        bus.connection.ask("EXISTS", bus.keys.images, bus.keys.images_counted, bus.keys.images_held)
        == 0
    )


def test_nothing_large_passes_through_a_hop(bus: Bus, tiny: Tiny, tmp_path: Path) -> None:
    pictures = [noise(1, 1024, 1024), noise(2, 32, 32)]
    generate(
        bus,
        settings_of(tiny, tmp_path, [*(shows(picture.data_url) for picture in pictures), "?"]),
        tiny,
        problems=3,
    )
    sizes: dict[str, list[int]] = {}
    for entry in bus.streams.read("score", 100):
        rollout = decode_work(entry.payload)
        assert isinstance(rollout, Rollout)
        (sample,) = rollout.samples
        sizes.setdefault("".join(sample.images), []).append(
            len(entry.payload) - len(sample.prompt_ids)
        )
    large, small, text = (max(sizes[name]) for name in (pictures[0].digest, pictures[1].digest, ""))
    print(
        f"records without the ids of their prompts: {large} bytes with 1,048,576 pixels, {small} "
        f"with 1,024, {text} with none"
    )
    assert max(large, small) - text < NAMED_BYTES
