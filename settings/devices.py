"""Where models run, and the GPUs of this machine.

GPUs are found by their device files: asking torch would mean importing it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from onstream.settings.sections.deployment import DeploymentSettings

UNCOUNTED = ("dxg", "nvhost-gpu")
"""The device files of GPUs that CUDA has and that are not numbered: those of WSL and of Jetson."""


def device_of(deployment: DeploymentSettings) -> Literal["cpu", "cuda"]:
    """Where models run: as `deployment.device` says, or on CUDA where a GPU is found."""
    if deployment.device != "auto":
        return deployment.device
    return "cuda" if gpus_found() else "cpu"


def has_uncounted_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether this machine may have a GPU that `gpus_found` does not find."""
    return any((devices / name).exists() for name in UNCOUNTED)


def gpus_found(devices: Path = Path("/dev"), environ: Mapping[str, str] = os.environ) -> list[str]:
    """The CUDA devices to be used, as `CUDA_VISIBLE_DEVICES` names them.

    Where that is set, no others.

    >>> gpus_found(Path("/nowhere"), {})
    []
    """
    present = sorted(int(path.name.removeprefix("nvidia")) for path in devices.glob("nvidia[0-9]*"))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if not present or visible is None:
        return [str(index) for index in range(len(present))]
    named = [name.strip() for name in visible.split(",")]
    # CUDA, too, ignores what comes after an empty name or -1.
    ends = [at for at, name in enumerate(named) if name in ("", "-1")]
    return named[: ends[0]] if ends else named


def smallest_gpu_bytes() -> int | None:
    """The memory of the smallest GPU here, by nvidia-smi; None where it tells of none."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    mebibytes = [int(line) for line in told.stdout.split() if line.isdigit()]
    return min(mebibytes) << 20 if mebibytes else None


def available_host_bytes(root: Path = Path("/")) -> int:
    """The memory of this machine, or of this container where it has a bound, that is free now.

    What the page cache has counts as free. `root` is where `proc` and `sys` are.
    """
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    free = _numbers(root / "proc/meminfo").get("MemAvailable:", free // 1024) * 1024
    container = root / "sys/fs/cgroup"
    try:
        bound = int((container / "memory.max").read_text())
        used = int((container / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a bound ("max")
        return free
    cached = _numbers(container / "memory.stat").get("inactive_file", 0)
    return min(free, max(0, bound - used + cached))


def _numbers(path: Path) -> dict[str, int]:
    """The first number of each line, by the word before it; none where there is no such file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1}


def host_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
