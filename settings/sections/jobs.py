"""`[jobs]`: work beside the training, on RQ: evaluations, exports, pruning and sweeps."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from onstream.settings.base import WORKER, Section, Unit


class JobsSettings(Section):
    """Jobs, which `onstream worker jobs` does. docs/jobs.md explains them."""

    time_limit: Annotated[int, WORKER, Unit("s"), Field(ge=1, le=7 * 86400)] = 1800
    """How long a job may take; a second past it, it is killed with all that it has started."""
    retries: Annotated[int, WORKER, Unit("times"), Field(ge=0, le=100)] = 2
    """How often a job that failed or was killed is tried again."""
    max_waiting: Annotated[int, WORKER, Unit("evaluations"), Field(ge=1, le=1000)] = 8
    """Evaluations that may wait; each keeps its policy version on disk. Past it a step is not
    evaluated, which the trainer's log says.
    """
    keep_results: Annotated[int, WORKER, Unit("s"), Field(ge=60, le=366 * 86400)] = 7 * 86400
    """How long Redis keeps what a job came to."""
    sweep_interval: Annotated[int, WORKER, Unit("s"), Field(ge=0, le=86400)] = 300
    """How often the run is swept: consumers that died, versions kept for jobs that are gone; 0 is
    never.
    """
    upload: Annotated[tuple[str, ...] | None, WORKER, Field(min_length=1)] = None
    """The command that `onstream jobs export --upload` runs, without a shell, such as
    `["aws", "s3", "cp", "--recursive", "{path}", "s3://bucket/{run}/{version}"]`."""
