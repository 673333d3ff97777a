"""The environment of the launcher's children.

Imports little: every worker reads its number of threads here before it imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from onstream.pipeline.processes import usable_cores
from onstream.settings.sections.deployment import DeploymentSettings
from onstream.settings.stages import COMPUTING, JOBS, WorkerKind

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def environment(
    deployment: DeploymentSettings, workers: Mapping[WorkerKind, int], redis_url: str | None
) -> dict[str, str]:
    """The launcher's own environment, with the address of its Redis and the number of threads."""
    environ = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"} | dict(os.environ)
    if redis_url is not None:
        environ["ONSTREAM_REDIS__URL"] = redis_url
    if deployment.threads is not None or "OMP_NUM_THREADS" not in environ:
        environ |= dict.fromkeys(
            THREAD_VARIABLES, str(deployment.threads or default_threads(workers))
        )
    return environ


def default_threads(workers: Mapping[WorkerKind, int], cores: int | None = None) -> int:
    """Threads of each worker that computes tensors.

    1 with up to 4 cores, else the cores shared out among them.
    """
    cores = cores or usable_cores()
    computing = sum(count for kind, count in workers.items() if kind in (*COMPUTING, JOBS.kind))
    return 1 if cores <= 4 else max(1, cores // max(1, computing))
