"""What the trainer of a run takes of its GPU's memory: told before it starts, or refused.

By formula, from the settings and the student's `config.json`. Imports neither torch nor
transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.memory import (
    DecoderSizes,
    MemoryPlan,
    TrainerMemory,
    memory_plan,
)
from onstream.settings.devices import host_bytes, smallest_gpu_bytes
from onstream.settings.gpus import memory_share
from onstream.settings.plan import make_plan
from onstream.settings.record_sizes import longest_completion
from onstream.settings.root import Settings
from onstream.settings.sections.trainer import LoraSettings
from onstream.settings.toml import shown_bytes
from onstream.workers.launcher.model_files import local_model, model_config, parameters

Device = Literal["cpu", "cuda"]
LEAST_MICROBATCH = 1024
LEAST_HEAD_CHUNK = 256


def memory_rows(settings: Settings) -> dict[str, str]:
    """What `onstream check` prints of the trainer's memory, by the names of its lines.

    Nothing where no trainer starts here, or the student is not on this machine.
    """
    run = make_plan(settings)
    if not run.workers.get("trainer"):
        return {}
    room = _room(settings, run.device)
    try:
        plan = _plan(settings, run.device, room)
    except UserError:  # told by the checks
        return {}
    if plan is None:
        return {}
    if plan.memory is None:
        return {"together": "not known: the student's config.json does not say its sizes"}
    compared = f"of the {shown_bytes(host_bytes())} of this machine"
    if run.device == "cuda":
        compared = "of a GPU whose memory is not known: nvidia-smi tells nothing"
    if room is not None:
        compared = f"of the {shown_bytes(room)} of its GPU"
    return _rows(settings, plan, plan.memory, compared)


def check_memory(settings: Settings, device: Device) -> None:
    """Check that the trainer fits its GPU, where the sizes of both are known.

    On a CPU, that the machine has room for what is always there: weights, gradients, moments.

    Raises:
        UserError: it does not; the message names the setting that would make it fit.
    """
    if device == "cpu":
        _check_host(settings)
    room = _room(settings, device)
    if room is None:
        return
    plan = _plan(settings, device, room)
    if plan is None or plan.memory is None or plan.memory.device <= room:
        return
    raise UserError(
        f"the trainer of {settings.model.name} takes about {shown_bytes(plan.memory.device)} with "
        f"rows of {plan.row_tokens:,} tokens",
        expected=f"at most the {shown_bytes(room)} of its GPU",
        next_step=_advice(settings, device, room),
    )


def _check_host(settings: Settings) -> None:
    """Check that a trainer on a CPU can hold its model.

    Raises:
        UserError: it cannot.
    """
    held_bytes = _held_bytes(settings)
    if held_bytes <= host_bytes():
        return
    adapter = _with(settings, {"lora": LoraSettings()})
    fits = settings.trainer.lora is None and _held_bytes(adapter) <= host_bytes()
    raise UserError(
        f"the trainer of {settings.model.name} takes {shown_bytes(held_bytes)} for weights, "
        "gradients and the optimizer alone",
        expected=f"at most the {shown_bytes(host_bytes())} of this machine",
        next_step="Set trainer.lora.rank = 16." if fits else "Take a smaller student, or a GPU.",
    )


def _held_bytes(settings: Settings) -> int:
    """What a trainer on a CPU holds of its model all the time; 0 where that is not known."""
    plan = _plan(settings, "cpu", None)
    if plan is None or plan.memory is None:
        return 0
    memory = plan.memory
    return memory.weights + memory.gradients + memory.optimizer + memory.host_optimizer


def _plan(settings: Settings, device: Device, room: float | None) -> MemoryPlan | None:
    """None where the student is not on this machine.

    Raises:
        UserError: there is no such model, or its configuration cannot be read.
    """
    directory = local_model(settings.model.name, ask_hub=False)
    if directory is None:
        return None
    return memory_plan(
        settings,
        model_config(directory, "model.name"),
        half=computes_in_half(settings, device),
        device_bytes=room,
        parameters=parameters(directory) or None,
    )


def computes_in_half(settings: Settings, device: Device) -> bool:
    """Whether the trainer computes in bfloat16, and publishes in it."""
    given = settings.trainer.dtype
    return given == "bfloat16" or (given == "auto" and device == "cuda")


def trained_parameters(settings: Settings, student: Path) -> int:
    """How many parameters are trained: those of the adapter where there is one.

    All of them where the sizes of the model in `student` are not known.
    """
    shape = DecoderSizes.of(model_config(student, "model.name"))
    adapter = settings.trainer.lora
    if adapter is None or shape is None:
        return parameters(student)
    return shape.adapter(adapter)


def _room(settings: Settings, device: Device) -> float | None:
    """The bytes of its GPU that the trainer may take; None on a CPU, or where none is told of."""
    found = smallest_gpu_bytes() if device == "cuda" else None
    return None if found is None else found * (memory_share(settings, "trainer") or 1.0)


def _rows(
    settings: Settings, plan: MemoryPlan, memory: TrainerMemory, compared: str
) -> dict[str, str]:
    optimizer = memory.optimizer or memory.host_optimizer
    kept = {"device": "", "host": "in the host's memory", "8bit": "in 8 bits"}
    rows = {
        "weights": (memory.weights, ""),
        "gradients": (memory.gradients, ""),
        "optimizer": (optimizer, kept[settings.trainer.optim.states]),
        "activations": (memory.activations, _of_rows(plan)),
        "head": (memory.head, f"{settings.trainer.head_chunk:,} positions at once"),
        "together": (memory.device, compared),
        "published": (memory.published, "in the host's memory"),
        "checkpoint": (memory.checkpoint, "in the host's memory, while one is written"),
    }
    return {
        name: f"{shown_bytes(count):>8}  {words}".rstrip() for name, (count, words) in rows.items()
    }


def _of_rows(plan: MemoryPlan) -> str:
    layers = "layers recomputed" if plan.recompute else "nothing recomputed"
    return f"rows of {plan.row_tokens:,} tokens, {layers}"


def _advice(settings: Settings, device: Device, room: float) -> str:
    """The first change that makes the trainer fit, or the first few together."""
    together = settings
    made: list[str] = []
    for words, changed in _changes(settings):
        if _fits(_with(settings, changed), device, room):
            return f"Set {words}."
    for words, changed in _changes(settings):
        together = _with(together, changed)
        made.append(words)
        if _fits(together, device, room):
            return f"Set {', '.join(made)}."
    return "Take a smaller student, or a GPU with more memory."


def _changes(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings of the trainer that save memory, in words and as values, the cheapest first."""
    trainer = settings.trainer
    if trainer.recompute == "none":
        yield 'trainer.recompute = "layer"', {"recompute": "layer"}
    least = max(LEAST_MICROBATCH, longest_completion(settings))
    if least < trainer.microbatch:
        yield f"trainer.microbatch = {least}", {"microbatch": least}
    if trainer.head_chunk > LEAST_HEAD_CHUNK:
        chunk = LEAST_HEAD_CHUNK
        yield f"trainer.head_chunk = {chunk}", {"head_chunk": chunk}
    if trainer.optim.states == "device" and trainer.optim.type == "adamw":
        on_host = trainer.optim.model_copy(update={"states": "host"})
        yield 'trainer.optim.states = "host"', {"optim": on_host}
    if trainer.lora is None:
        yield "trainer.lora.rank = 16", {"lora": LoraSettings()}


def _with(settings: Settings, changed: dict[str, Any]) -> Settings:
    trainer = settings.trainer.model_copy(update=changed)
    return settings.model_copy(update={"trainer": trainer})


def _fits(settings: Settings, device: Device, room: float) -> bool:
    plan = _plan(settings, device, room)
    return plan is not None and plan.memory is not None and plan.memory.device <= room
