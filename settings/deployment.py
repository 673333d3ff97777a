"""`[deployment]`: which workers run here, how many, and on what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from onstream.settings.base import RUN, WORKER, Section, Unit
from onstream.settings.stages import STAGES, StageName, WorkerKind

Share = Annotated[float | None, WORKER, Unit("share"), Field(gt=0, le=1)]


class GpuMemoryShares(Section):
    """Shares of one GPU's memory, for workers that share it."""

    train: Share = None
    """The trainer's share."""
    inference: Share = None
    """Each generator's share."""
    teacher: Share = None
    """Each teacher worker's share."""


Count = Annotated[int | None, WORKER, Unit("workers"), Field(ge=0, le=1024)]


class ScaleSettings(Section):
    """Workers that somebody else starts beside this process: Docker Compose, Swarm, Kubernetes.
    `onstream up` starts none of these kinds.

    A kind without workers counts as left out: without a `verifier` nothing is verified, without a
    `teacher` there is none beside the run.
    """

    generator: Count = None
    """Generators that others start."""
    verifier: Count = None
    """Verifiers that others start. 0 turns verification off, unless a setting says so explicitly.
    """
    teacher: Count = None
    """Teachers with a model of their own that others start. 0: there is none, whatever
    `teacher_inference.model.name` says.
    """
    teacher_external: Count = None
    """Workers that ask the endpoints of `orchestrator.teacher_model`, which others start."""
    jobs: Count = None
    """Workers for jobs that others start."""

    def of(self, kind: WorkerKind) -> int | None:
        """How many workers of `kind` others start; None where it is not said, and always for the
        trainer.
        """
        count: int | None = getattr(self, kind.replace("-", "_"), None)
        return count


class DeploymentSettings(Section):
    """The processes of a run."""

    stages: Annotated[
        tuple[StageName, ...] | None, WORKER, Field(min_length=1, max_length=len(STAGES))
    ] = None
    """The stages that have consumers in this deployment. Unset: what the other settings ask for.
    Leaving out `verify` or `score` turns verification or the teacher off, unless a setting says so
    explicitly."""
    num_teacher_gpus: Annotated[int | None, RUN, Unit("GPUs"), Field(ge=1, le=1024)] = None
    """Starts the teacher beside the run, on so many GPUs; on `device = "cpu"`, so many teacher
    processes, or one vLLM server where `teacher_inference.engine = "vllm"`. Without
    `teacher_inference.model.name` the teacher is the student's starting model."""
    num_infer_gpus: Annotated[int | None, WORKER, Unit("GPUs"), Field(ge=1, le=1024)] = None
    """GPUs of the vLLM servers that `onstream up` starts for the student where `inference.engine =
    "server"` has no `inference.client.base_url`: a server for each `tensor_parallel_size` ×
    `data_parallel_size` of them; on `device = "cpu"`, so many servers. Unset: one server."""
    generators: Annotated[int, WORKER, Unit("workers"), Field(ge=0, le=1024)] = 1
    """Generator workers that `onstream up` starts."""
    verifiers: Annotated[int, WORKER, Unit("workers"), Field(ge=0, le=1024)] = 1
    """Verifier workers that `onstream up` starts."""
    external_teachers: Annotated[int, WORKER, Unit("workers"), Field(ge=0, le=1024)] = 1
    """Workers that ask the external teacher, which `onstream up` starts where
    `orchestrator.teacher_model` is set.
    """
    jobs: Annotated[int, WORKER, Unit("workers"), Field(ge=0, le=64)] = 1
    """Workers for jobs that `onstream up` starts where `eval.interval` is set, or
    `verification.in_jobs` asks for them.
    """
    share_gpus: Annotated[bool, WORKER] = False
    """Let workers share GPUs where there are fewer than workers, by the shares of
    `deployment.gpu_memory_shares`.
    """
    device: Annotated[Literal["auto", "cpu", "cuda"], WORKER] = "auto"
    """Where models run; `auto` is CUDA where a GPU is found."""
    threads: Annotated[int | None, WORKER, Unit("threads"), Field(ge=1, le=1024)] = None
    """CPU threads of each worker's tensor library. Unset: 1 on a CPU with up to 4 cores, else cores
    divided by workers.
    """
    max_restarts: Annotated[int, WORKER, Unit("deaths"), Field(ge=0, le=1000)] = 5
    """Deaths of one worker in a row, without any progress of the run between them, after which the
    run stops.
    """
    status_interval: Annotated[float, WORKER, Unit("s"), Field(ge=0.1, le=3600)] = 2.0
    """How often `onstream up` prints the state of the run where standard output is not a terminal.
    """
    gpu_memory_shares: GpuMemoryShares = GpuMemoryShares()
    scale: ScaleSettings = ScaleSettings()
