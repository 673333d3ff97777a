"""How much memory of the host is free, as its kernel and its container say."""

from __future__ import annotations

from pathlib import Path

import pytest

from onstream.settings.devices import available_host_bytes, host_bytes


@pytest.mark.parametrize(
    ("bound", "expected"),
    [(None, 8 << 30), ("max", 8 << 30), (str(4 << 30), 3 << 30), (str(1 << 30), 0)],
    ids=["no container", "one without a bound", "one with less", "one that is full"],
)
def test_free_memory_is_that_of_the_machine_or_of_a_smaller_container(
    tmp_path: Path, bound: str | None, expected: int
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 999 kB\nMemAvailable: {8 << 20} kB\n")
    if bound is not None:
        group = tmp_path / "sys/fs/cgroup"
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{bound}\n")
        (group / "memory.current").write_text(f"{2 << 30}\n")
        (group / "memory.stat").write_text(f"anon 5\ninactive_file {1 << 30}\n")
    assert available_host_bytes(tmp_path) == expected


def test_this_machine_has_some() -> None:
    assert 0 < available_host_bytes() <= host_bytes()
