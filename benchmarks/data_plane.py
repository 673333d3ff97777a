"""How fast records move: XADD, read, hop, and three processes in a chain, beside the same chain
written in bare Redis calls.

    python -m benchmarks.data_plane [--bytes 8192] [--seconds 4]

The chain is a producer that encodes, a worker of `onstream.pipeline.loop` that decodes, encodes and
hops, and a sink that decodes and acknowledges; its producer waits while more than a few hundred
records are under way. The bare chain does the same with redis-py alone, in batches of 16: no
leases, no re-delivery, no heartbeat.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median
from typing import Any

import click
import psutil
from redis import Redis

from onstream.pipeline.loop import Worker, run_worker
from onstream.pipeline.record_codec import (
    decode_work,
    encode,
    ids_bytes,
    logprobs_bytes,
    mask_bytes,
)
from onstream.pipeline.records import Rollout, Sample, StageName
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.streams import Move, Out
from onstream.pipeline.stage import Delivery, Outcome, Stats
from onstream.settings.sections.run import DeliverySettings
from onstream.workers.launcher.embedded_redis import EmbeddedRedis

TARGET_PER_S = 5000
TARGET_SHARE = 0.8
UNDER_WAY = 512
BATCH = 16
BARE_HOP = """
local out = {}
for i = 1, (#ARGV-1)/2 do
  local id = ARGV[2*i]
  if redis.call('XACK', KEYS[1], ARGV[1], id) == 1 then
    redis.call('XDEL', KEYS[1], id)
    redis.call('XADD', KEYS[2], '*', 'b', ARGV[2*i+1])
    out[i] = 1
  else out[i] = 0 end
end
return out
"""
Role = Callable[[str, str, int, Event], int]


def record(number: int, size_bytes: int) -> Rollout:
    """A rollout of about `size_bytes` on the wire: 9 bytes a token."""
    tokens = max(1, (size_bytes - 200) // 9)
    sample = Sample(
        ids_bytes(range(16)),
        ids_bytes(range(tokens)),
        mask_bytes([1] * tokens),
        logprobs_bytes([-1.5] * tokens),
        [],
        "",
    )
    return Rollout(
        number,
        number // 8,
        8,
        0,
        [{"role": "user", "content": "Reverse: word"}],
        {},
        [sample],
        1.0,
        "stop",
        ["verify", "train"],
    )


class Hop:
    """A stage that passes rollouts on."""

    name: StageName = "verify"
    holds_entries = False
    room = 64
    busy = False

    def __init__(self) -> None:
        self.stats = Stats()

    def setup(self) -> None:
        """Nothing to load."""

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Every rollout, to the next stage of its route."""
        return [
            Outcome(delivery, delivery.record)
            for delivery in new
            if isinstance(delivery.record, Rollout)
        ]

    def close(self, *, finished: bool) -> None:
        """Nothing to release."""


def connect(url: str, run: str, consumer: str) -> Bus:
    """A bus of this benchmark."""
    return Bus.connect(url, run, consumer=consumer, block_s=1.0, connect_timeout_s=5)


def bare(url: str) -> Any:
    """A client as redis-py's users would make it."""
    return Redis.from_url(url, protocol=2, socket_read_size=1 << 18)


def produce(
    client: Any,
    stream: str,
    size_bytes: int,
    stop: Event,
    fields: Callable[[int, bytes], dict[str, Any]],
    sink: str,
    issued: str | None = None,
) -> int:
    """Encode records into `stream`, while few enough are under way to `sink`; returns how many.

    They count as issued in the key `issued`, where there is one.
    """
    number = 0
    template = record(1, size_bytes)
    while not stop.is_set():
        if client.xlen(stream) + client.xlen(sink) >= UNDER_WAY:
            time.sleep(0.002)
            continue
        pipe = client.pipeline(transaction=False)
        if issued:
            pipe.set(issued, number + BATCH)
        for _ in range(BATCH):
            number += 1
            template.number = number
            pipe.xadd(stream, fields(number, encode(template)))
        pipe.execute()
    return number


def our_producer(url: str, run: str, size_bytes: int, stop: Event) -> int:
    """Writes entries of the stage `verify`."""
    bus = connect(url, run, "producer")
    return produce(
        bare(url),
        bus.keys.streams["verify"],
        size_bytes,
        stop,
        lambda n, payload: {"n": n, "b": payload},
        bus.keys.streams["train"],
        bus.keys.issued,
    )


def our_hop(url: str, run: str, size_bytes: int, stop: Event) -> int:
    """The worker loop; it ends when the run has finished."""
    return int(run_worker(Hop(), connect(url, run, "hop"), DeliverySettings(), block_s=1.0))


def our_sink(url: str, run: str, size_bytes: int, stop: Event) -> int:
    """Reads, decodes and acknowledges like the trainer; counts the records, and ends the run."""
    bus = connect(url, run, "sink")
    count = 0
    lease = bus.lease.acquire(60)
    while not stop.is_set():
        entries = bus.streams.read("train", 64, 0.2)
        count += len([decode_work(entry.payload) for entry in entries])
        bus.lease.acknowledge(lease, {entry.id: entry.number for entry in entries})
    bus.lease.finish(lease)
    return count


def bare_producer(url: str, run: str, size_bytes: int, stop: Event) -> int:
    """The same, of the bare chain."""
    return produce(
        bare(url), f"{run}:up", size_bytes, stop, lambda n, payload: {"b": payload}, f"{run}:down"
    )


def bare_hop(url: str, run: str, size_bytes: int, stop: Event) -> int:
    """Read, decode, encode and the fenced script, in batches."""
    client = bare(url)
    group = "g"
    for stream in (f"{run}:up", f"{run}:down"):
        client.xgroup_create(stream, group, "0", mkstream=True)
    sha = client.script_load(BARE_HOP)
    while not stop.is_set():
        args: list[Any] = [group]
        for _, entries in (
            client.xreadgroup(group, "hop", {f"{run}:up": ">"}, count=BATCH, block=200) or []
        ):
            for entry_id, fields in entries:
                args += [entry_id, encode(decode_work(fields[b"b"]))]
            client.evalsha(sha, 2, f"{run}:up", f"{run}:down", *args)
    return 0


def bare_sink(url: str, run: str, size_bytes: int, stop: Event) -> int:
    """Read, decode, acknowledge and delete, in batches; counts the records."""
    client = bare(url)
    count = 0
    while not client.exists(f"{run}:down"):
        time.sleep(0.01)
    while not stop.is_set():
        for _, entries in (
            client.xreadgroup("g", "sink", {f"{run}:down": ">"}, count=BATCH, block=200) or []
        ):
            count += len([decode_work(fields[b"b"]) for _, fields in entries])
            pipe = client.pipeline(transaction=False)
            pipe.xack(f"{run}:down", "g", *[entry_id for entry_id, _ in entries])
            pipe.xdel(f"{run}:down", *[entry_id for entry_id, _ in entries])
            pipe.execute()
    return count


def _role(role: Role, url: str, run: str, size_bytes: int, stop: Event, counts: Any) -> None:
    counts.put((role.__name__, role(url, run, size_bytes, stop)))


def chain(
    roles: Sequence[Role], url: str, run: str, size_bytes: int, seconds: float
) -> tuple[float, dict[str, float]]:
    """Records/s that the last of `roles` took within `seconds`, and the CPU seconds of each and of
    Redis meanwhile, a process to a role.
    """
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    counts = spawn.SimpleQueue()
    processes = [
        spawn.Process(target=_role, args=(role, url, run, size_bytes, stop, counts))
        for role in roles
    ]
    for process in processes:
        process.start()
    client = bare(url)
    streams = (f"{run}:down", f"{{onstream:{run}}}:stream:train")
    while not any(client.xlen(key) for key in streams):
        time.sleep(0.005)
    pids = {role.__name__: process.pid for role, process in zip(roles, processes, strict=True)} | {
        "redis": client.info()["process_id"]
    }
    started = time.monotonic()
    before = _cpu_seconds(pids)
    time.sleep(seconds)
    after = _cpu_seconds(pids)
    stop.set()
    elapsed = time.monotonic() - started
    taken = dict(counts.get() for _ in processes)
    for process in processes:
        process.join()
    return taken[roles[-1].__name__] / elapsed, {name: after[name] - before[name] for name in pids}


def _cpu_seconds(pids: Mapping[str, int]) -> dict[str, float]:
    times = {name: psutil.Process(pid).cpu_times() for name, pid in pids.items()}
    return {name: spent.user + spent.system for name, spent in times.items()}


def timed(
    what: str,
    size_bytes: int,
    seconds: float,
    once: Callable[[], int],
    before: Callable[[], None] = lambda: None,
) -> None:
    """Print the rate of `once`, which returns how many records it moved.

    `before` prepares each call, untimed.
    """
    moved = 0
    spent = 0.0
    cpu = 0.0
    while spent < seconds:
        before()
        started = time.perf_counter()
        cpu_before = time.process_time()
        moved += once()
        cpu += time.process_time() - cpu_before
        spent += time.perf_counter() - started
    print(
        f"{what:<42}{moved / spent:>9,.0f} records/s{moved / spent * size_bytes / 1e6:>8,.0f} MB/s"
        f"{cpu / moved * 1e6:>8,.1f} µs CPU here"
    )


def single(url: str, size_bytes: int, seconds: float) -> None:
    """One process: what each call costs alone."""
    bus = connect(url, "single", "one")
    client = bare(url)
    payloads = {number: encode(record(number, size_bytes)) for number in range(1, 321)}
    up = bus.keys.streams["verify"]
    down = bus.keys.streams["train"]

    def fill(entries: Mapping[int, bytes] = payloads) -> None:
        client.delete(up, down)
        bus.connection.create_groups()
        pipe = client.pipeline(transaction=False)
        for number, payload in entries.items():
            pipe.xadd(up, {"n": number, "b": payload})
        pipe.execute()

    def read() -> int:
        return sum(len(bus.streams.read("verify", 32)) for _ in range(10))

    def hop() -> int:
        return sum(
            bus.streams.move(
                "verify",
                [Move(entry.id, [Out("train", entry.number, entry.payload)]) for entry in held],
            )
        )

    held: list[Any] = []

    def refill() -> None:
        fill()
        held[:] = bus.streams.read("verify", 320)

    timed(
        "XADD one by one",
        size_bytes,
        seconds,
        lambda: len([client.xadd(up, {"b": payloads[1]}) for _ in range(100)]),
        lambda: fill({}),
    )
    timed("read, 32 at once", size_bytes, seconds, read, fill)
    timed("hop, 32 in a script", size_bytes, seconds, hop, refill)
    worker = Worker(Hop(), bus, DeliverySettings(lease=600), block_s=0)

    def turns() -> int:
        while worker.state.done < 320:
            worker.turn()
        return worker.state.done

    def refill_worker() -> None:
        worker.state.done = 0
        fill()
        client.set(bus.keys.issued, 320)

    timed("a worker's turns: read, decode, hop", size_bytes, seconds, turns, refill_worker)
    bus.close()


@click.command()
@click.option("--bytes", "size_bytes", default=8192, show_default=True, help="Size of a record.")
@click.option("--seconds", default=4.0, show_default=True, help="How long each chain runs.")
@click.option(
    "--rounds",
    default=3,
    show_default=True,
    help="Runs of each chain, in turn; the best rate and the median share count.",
)
def main(size_bytes: int, seconds: float, rounds: int) -> None:
    """Print the figures, and whether they reach the target; exit code 1 where they do not."""
    size = len(encode(record(1, size_bytes)))
    print(f"records of {size:,} bytes, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as data:
        server = EmbeddedRedis(Path(data), max_memory_mb=512)
        url = server.start()
        single(url, size, min(1.0, seconds))
        rates: dict[str, list[float]] = {"bare": [], "ours": []}
        for turn in range(rounds):
            for name, roles in (
                ("bare", (bare_producer, bare_hop, bare_sink)),
                ("ours", (our_producer, our_hop, our_sink)),
            ):
                rate, cpu = chain(roles, url, f"{name}-{turn}", size_bytes, seconds)
                rates[name].append(rate)
                speed = f"{rate:>9,.0f} records/s{rate * size / 1e6:>8,.0f} MB/s"
                print(f"chain of three processes, {name:<16}{speed}", cpu_line(cpu))
        server.stop()
    ours = max(rates["ours"])
    shares = [one / other for one, other in zip(rates["ours"], rates["bare"], strict=True)]
    share = median(shares)
    reached = ours >= TARGET_PER_S or share >= TARGET_SHARE
    verdict = "reached" if reached else "MISSED"
    print(
        f"ours {ours:,.0f}/s, {share:.2f} of bare; "
        f"target {TARGET_PER_S:,}/s or {TARGET_SHARE}: {verdict}"
    )
    raise SystemExit(not reached)


def cpu_line(cpu: dict[str, float]) -> str:
    """CPU seconds by role."""
    return "  CPU " + ", ".join(
        f"{name.rpartition('_')[2]} {seconds:.1f} s" for name, seconds in cpu.items()
    )


if __name__ == "__main__":
    main()
