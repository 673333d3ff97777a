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


def host_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
