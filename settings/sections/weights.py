"""`[weights]`: how policy versions get from the trainer to the generators."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from onstream.settings.base import CHANGEABLE, WORKER, Section, Unit


class WeightsSettings(Section):
    """How policy versions get from the trainer to the generators: docs/weights.md."""

    transport: Annotated[Literal["filesystem", "redis", "nccl"], CHANGEABLE] = "filesystem"
    """`filesystem`: generators read the trainer's run directory. `redis`: chunks through the run's
    Redis, for generators that share no disk with the trainer. `nccl`: from GPU to GPU by vLLM's
    weight transfer, and by the run directory where that fails; not proven on any GPU yet."""
    delta: Annotated[bool | None, WORKER] = None
    """Ship only the weights that changed, where that is fewer bytes: with a bfloat16 policy,
    mostly. The trainer decides. Unset: with `redis` alone; a run directory then holds every version
    as a model directory."""
    full_every: Annotated[int, WORKER, Unit("versions"), Field(ge=1, le=10**6)] = 20
    """With deltas, or unless by `filesystem`, versions that divide by this are written as model
    directories and, for generators, as full sets."""
    max_share: Annotated[float, WORKER, Unit("share"), Field(gt=0, le=0.9)] = 0.5
    """Share of Redis's maxmemory that weights may take, with `redis`."""
    patience: Annotated[float, WORKER, Unit("seconds"), Field(gt=0, le=250)] = 120.0
    """How long one transfer may take, with `nccl`, before it is given up and the version goes by
    file.
    """

    @property
    def deltas(self) -> bool:
        """Whether the trainer ships deltas."""
        return self.transport == "redis" if self.delta is None else self.delta
