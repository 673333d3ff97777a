"""`[deployment]`: which workers there are, how many, who starts them, and on what they run.

The counts and the shares of a GPU follow from the stage table: a new kind of worker gets its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model

from onstream.settings.base import RUN, WORKER, Section, Unit
from onstream.settings.stages import COMPUTING, COUNTED, STAGES, StageName, WorkerKind, WorkerSpec

Share = Annotated[float | None, WORKER, Unit("share"), Field(gt=0, le=1)]
Count = Annotated[int, WORKER, Unit("workers"), Field(ge=0, le=1024)]
OptionalCount = Annotated[int | None, WORKER, Unit("workers"), Field(ge=0, le=1024)]


class _GpuMemoryShares(Section):
    """Shares of one GPU's memory, for workers that share it."""

    def of(self, kind: WorkerKind) -> float | None:
        """The share of a worker of `kind`; None where none is set."""
        share: float | None = getattr(self, COMPUTING[kind])
        return share


class _WorkerCounts(Section):
    """How many workers of each kind there are. 0 leaves a kind out: without a `verifier` nothing is
    verified, without a `teacher` there is none beside the run."""

    def of(self, kind: WorkerKind) -> int | None:
        """How many workers of `kind` there are; None where that follows from other settings."""
        count: int | None = getattr(self, count_name(kind), 1)
        return count


def count_name(kind: WorkerKind) -> str:
    """The name of the count of `kind` in `[deployment.workers]`."""
    return kind.replace("-", "_")


def _count_field(worker: WorkerSpec) -> tuple[Any, Any]:
    count_type = OptionalCount if worker.count is None else Count
    return count_type, Field(worker.count, description=worker.count_doc)


if TYPE_CHECKING:  # which cannot know the fields of a model that is made here
    GpuMemoryShares = _GpuMemoryShares
    WorkerCounts = _WorkerCounts
else:
    GpuMemoryShares = create_model(
        "GpuMemoryShares",
        __base__=_GpuMemoryShares,
        __doc__=_GpuMemoryShares.__doc__,
        **{
            share: (Share, Field(None, description=f"The share of each {kind}."))
            for kind, share in COMPUTING.items()
        },
    )
    WorkerCounts = create_model(
        "WorkerCounts",
        __base__=_WorkerCounts,
        __doc__=_WorkerCounts.__doc__,
        **{count_name(worker.kind): _count_field(worker) for worker in COUNTED},
    )


class DeploymentSettings(Section):
    """The processes of a run."""

    stages: Annotated[
        tuple[StageName, ...] | None, WORKER, Field(min_length=1, max_length=len(STAGES))
    ] = None
    """The stages that have workers in this deployment. Unset: what the other settings ask for.
    Leaving out `verify` or `score` turns verification or the teacher off, unless a setting says so
    explicitly."""
    started_elsewhere: Annotated[tuple[WorkerKind, ...], WORKER] = ()
    """Kinds of worker that somebody else starts: Docker Compose, Swarm, Kubernetes, or you on
    another machine. `onstream up` starts none of them."""
    num_teacher_gpus: Annotated[int | None, RUN, Unit("GPUs"), Field(ge=1, le=1024)] = None
    """Starts the teacher beside the run, on so many GPUs; on `device = "cpu"`, so many teacher
    processes, or one vLLM server where `teacher_inference.engine = "vllm"`. Without
    `teacher_inference.model.name` the teacher is the student's starting model."""
    num_infer_gpus: Annotated[int | None, WORKER, Unit("GPUs"), Field(ge=1, le=1024)] = None
    """GPUs of the vLLM servers that `onstream up` starts for the student where `inference.engine =
    "server"` has no `inference.client.base_url`: a server for each `tensor_parallel_size` ×
    `data_parallel_size` of them; on `device = "cpu"`, so many servers. Unset: one server."""
    share_gpus: Annotated[bool, WORKER] = False
    """Let workers share GPUs where there are fewer than workers, by the shares of
    `deployment.gpu_memory_shares`.
    """
    device: Annotated[Literal["auto", "cpu", "cuda"], WORKER] = "auto"
    """Where models run; `auto` is CUDA where a GPU is found."""
    threads: Annotated[int | None, WORKER, Unit("threads"), Field(ge=1, le=1024)] = None
    """CPU threads of each worker's tensor library. Unset: 1 on a CPU with up to 4 cores, else cores
    divided by workers (docs/health.md#threads).
    """
    balance: Annotated[Literal["fixed", "auto"], WORKER] = "fixed"
    """`auto`: `onstream up` starts one more worker of a stage that the trainer waits much for, and
    takes it away again where it gives little (docs/health.md#more-workers-while-it-trains).
    `fixed`: there are as many as `deployment.workers` says.
    """
    max_restarts: Annotated[int, WORKER, Unit("deaths"), Field(ge=0, le=1000)] = 5
    """Deaths of one worker in a row, without any progress of the run between them, after which the
    run stops.
    """
    status_interval: Annotated[float, WORKER, Unit("s"), Field(ge=0.1, le=3600)] = 2.0
    """How often `onstream up` prints the state of the run where standard output is not a terminal.
    """
    gpu_memory_shares: GpuMemoryShares = GpuMemoryShares()
    workers: WorkerCounts = WorkerCounts()

    def count_elsewhere(self, kind: WorkerKind) -> int:
        """How many workers of `kind` others start, as far as is said."""
        if kind not in self.started_elsewhere:
            return 0
        count = self.workers.of(kind)
        return 1 if count is None else count
