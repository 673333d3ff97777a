"""What an image costs the stages: Redis's memory over the life of a group that shows one, and the
rate of rollouts that name one.

    python -m benchmarks.images [--seconds 3] [--rounds 5]

The rate is of a chain of four processes: a producer of tickets, a generator's worker loop that
answers each at once (and holds its image), a verifier's worker loop that passes them on, and a sink
that acknowledges as the trainer does. Text and images take turns; rollouts of both have as many
tokens.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from PIL import Image

from benchmarks.data_plane import bare, chain, connect, cpu_line, our_hop, our_sink, produce, record
from onstream.pipeline.images import reference_of
from onstream.pipeline.loop import run_worker
from onstream.pipeline.record_codec import encode, ids_bytes
from onstream.pipeline.records import Rollout, StageName, Ticket
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.image_store import ImageHold
from onstream.pipeline.redis.keys import Keys
from onstream.pipeline.redis.streams import Move, Out
from onstream.pipeline.stage import Delivery, Outcome, Stats
from onstream.settings.sections.run import DeliverySettings
from onstream.workers.launcher.embedded_redis import EmbeddedRedis

GROUP = 16
SIDE = 1024
IMAGE_TOKENS = 1369
"""What Qwen2.5-VL makes of 1024 × 1024 pixels: a token of 28 × 28 each."""
RECORD_BYTES = 8192
TARGET_SHARE = 0.8
IMAGES = 8


def photo(seed: int, form: str = "JPEG") -> bytes:
    """A file of 1,048,576 pixels that compresses like a photograph: soft colours under a sensor's
    noise.
    """
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse, dtype=np.float32) + random.normal(0, 8, (SIDE, SIDE, 3))
    target = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target, form, quality=90)
    return target.getvalue()


def answered(ticket: Ticket, image: str | None) -> Rollout:
    """The rollout of `ticket`: its prompt has the tokens of an image, and names one where there is
    one.
    """
    made = record(ticket.number, RECORD_BYTES)
    made.samples[0].prompt_ids = ids_bytes([1] * (16 + IMAGE_TOKENS))
    made.group = ticket.group
    made.group_size = ticket.group_size
    made.route = list(ticket.route)
    if image:
        made.samples[0].images = [image]
        made.messages[0]["content"] = [
            {"type": "image_url", "image_url": {"url": reference_of(image)}}
        ]
    return made


class Answering:
    """A generator without a model: every ticket is answered at once. `image_of` names the image of
    a ticket, and gives its bytes.
    """

    name: StageName = "generate"
    holds_entries = False
    room = 64
    busy = False

    def __init__(self, bus: Bus, image_of: Callable[[Ticket], Mapping[str, bytes]]) -> None:
        self.stats = Stats()
        self._bus = bus
        self._image_of = image_of

    def setup(self) -> None:
        """Nothing to load."""

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Every ticket's rollout, its image held."""
        shown = [self._image_of(delivery.ticket) for delivery in new]
        holds = [
            ImageHold(delivery.entry_id, delivery.number, images)
            for delivery, images in zip(new, shown, strict=True)
            if images
        ]
        self._bus.images.hold(self.name, holds, patience_s=60)
        answers = [
            answered(delivery.ticket, next(iter(images), None))
            for delivery, images in zip(new, shown, strict=True)
        ]
        return [Outcome(delivery, answer) for delivery, answer in zip(new, answers, strict=True)]

    def close(self, *, finished: bool) -> None:
        """Nothing to release."""


def tickets(url: str, run: str, size_bytes: int, stop: Event) -> int:
    """Writes entries of the stage `generate`, a group at a time."""
    keys = connect(url, run, "producer").keys

    def fields(number: int, _: bytes) -> dict[str, Any]:
        group = (number - 1) // GROUP
        return {
            "n": number,
            "b": encode(Ticket(number, group, GROUP, group, number, 0, ["verify", "train"])),
        }

    return produce(bare(url), keys.streams["generate"], 0, stop, fields, keys.streams["train"])


def answers(url: str, run: str, image_of: Callable[[Ticket], Mapping[str, bytes]]) -> int:
    """The worker loop of a generator; it ends when the run has finished."""
    bus = connect(url, run, "generator")
    return int(run_worker(Answering(bus, image_of), bus, DeliverySettings(), block_s=1.0))


def text(url: str, run: str, size_bytes: int, stop: Event) -> int:
    """Answers that name no image."""
    return answers(url, run, lambda ticket: {})


def shared(url: str, run: str, size_bytes: int, stop: Event) -> int:
    """Every group shows one of a few images, which Redis keeps throughout: one more needs each of
    them.
    """
    images = [(hashlib.sha256(data).hexdigest(), data) for data in map(photo, range(IMAGES))]
    client = bare(url)
    keys = Keys(run)
    client.hset(keys.images, mapping=dict(images))
    client.hset(keys.images_counted, mapping={digest: 1 for digest, _ in images})
    return answers(url, run, lambda ticket: dict([images[ticket.group % IMAGES]]))


def fresh(url: str, run: str, size_bytes: int, stop: Event) -> int:
    """Every group shows an image that Redis has not got."""
    data = photo(0)
    return answers(
        url, run, lambda ticket: {hashlib.sha256(b"%d" % ticket.group).hexdigest(): data}
    )


def run_memory(bus: Bus) -> tuple[int, int]:
    """Bytes that Redis spends on all keys of the run, and the bytes of its images."""
    keys = list(bus.connection.client.scan_iter(match=f"{{onstream:{bus.run}}}:*", count=1000))
    return sum(bus.connection.client.memory_usage(key, samples=0) or 0 for key in keys), sum(
        map(len, bus.connection.client.hvals(bus.keys.images))
    )


def life_of_a_group(url: str, run: str, image: bytes) -> None:
    """Print what Redis spends on a group of 16 rollouts over `image`, stage by stage."""
    bus = connect(url, run, "one")
    lease = bus.lease.acquire(60)
    digest = hashlib.sha256(image).hexdigest()

    def tell(when: str) -> None:
        total, of_images = run_memory(bus)
        print(
            f"  {when:<34}{total:>12,} bytes of memory, {of_images:>9,} of images ({len(image):,} "
            "each)"
        )

    group = [
        Ticket(number, 0, GROUP, 0, number, 0, ["verify", "train"])
        for number in range(1, GROUP + 1)
    ]
    tell("before the group")
    bus.lease.issue(lease, 0, group, 1000)
    tell("issued")
    for entry, ticket in zip(bus.streams.read("generate", GROUP), group, strict=True):
        bus.images.hold(
            "generate", [ImageHold(entry.id, entry.number, {digest: image})], patience_s=1
        )
        bus.streams.move(
            "generate",
            [Move(entry.id, [Out("verify", entry.number, encode(answered(ticket, digest)))])],
        )
    tell("generated")
    waiting = bus.streams.read("verify", GROUP)
    bus.streams.move(
        "verify",
        [
            Move(entry.id, [Out("train", entry.number, entry.payload)])
            for entry in waiting[: GROUP // 2]
        ],
    )
    tell("half of them with the trainer")
    bus.streams.move(
        "verify",
        [
            Move(entry.id, [Out("train", entry.number, entry.payload)])
            for entry in waiting[GROUP // 2 :]
        ],
    )
    ids = {entry.id: entry.number for entry in bus.streams.read("train", GROUP)}
    last = dict([ids.popitem()])
    bus.lease.acknowledge(lease, ids)
    tell("all settled but one")
    bus.lease.acknowledge(lease, last)
    tell("all settled")
    bus.close()


@click.command()
@click.option("--seconds", default=3.0, show_default=True, help="How long each chain runs.")
@click.option(
    "--rounds",
    default=5,
    show_default=True,
    help="Runs of each chain, in turn; the medians count, and that of the rounds' shares.",
)
def main(seconds: float, rounds: int) -> None:
    """Print the figures, and whether they reach the target; exit code 1 where they do not."""
    size = len(encode(answered(Ticket(1, 0, GROUP, 0, 1, 0, ["train"]), None)))
    named = len(encode(answered(Ticket(1, 0, GROUP, 0, 1, 0, ["train"]), "0" * 64)))
    image = photo(0)
    print(
        f"a record of {size:,} bytes, {named - size} more where it names an image of "
        f"{len(image):,} bytes"
    )
    with tempfile.TemporaryDirectory() as data:
        server = EmbeddedRedis(Path(data), max_memory_mb=2048)
        url = server.start()
        for form in ("JPEG", "PNG"):
            print(f"a group of {GROUP} over an image of {SIDE} × {SIDE}, {form}")
            life_of_a_group(url, form, photo(0, form))
        rates: dict[str, list[float]] = {}
        costs: dict[str, list[float]] = {}
        for turn in range(rounds):
            for answer in (text, shared, fresh):
                rate, cpu = chain(
                    (tickets, answer, our_hop, our_sink),
                    url,
                    f"{answer.__name__}-{turn}",
                    size,
                    seconds,
                )
                rates.setdefault(answer.__name__, []).append(rate)
                costs.setdefault(answer.__name__, []).append(
                    sum(cpu.values()) / (rate * seconds) * 1e6
                )
                print(
                    f"chain of four processes, {answer.__name__:<16}{rate:>9,.0f} "
                    f"rollouts/s{cpu_line(cpu)}"
                )
        server.stop()
    of, cpu_us = (
        {name: median(some) for name, some in figures.items()} for figures in (rates, costs)
    )
    for name, words in (
        ("text", "no image"),
        ("shared", "an image that is there"),
        ("fresh", "an image of its own to each group"),
    ):
        print(f"{words:<36}{of[name]:>9,.0f} rollouts/s{cpu_us[name]:>9,.0f} us of CPU each")
    share = median(one / other for one, other in zip(rates["shared"], rates["text"], strict=True))
    verdict = "reached" if share >= TARGET_SHARE else "MISSED"
    print(
        f"with images {share:.2f} of text, the median of the rounds; by CPU "
        f"{cpu_us['text'] / cpu_us['shared']:.2f}"
    )
    print(f"target {TARGET_SHARE}: {verdict}")
    raise SystemExit(share < TARGET_SHARE)


if __name__ == "__main__":
    main()
