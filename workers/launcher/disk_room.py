"""Whether checkpoints and policy versions will have room on the disk: told before the start."""

from __future__ import annotations

import shutil
from pathlib import Path

from onstream.pipeline.errors import UserError
from onstream.settings.root import Settings
from onstream.settings.toml import shown_bytes
from onstream.workers.launcher.model_files import parameters
from onstream.workers.launcher.trainer_memory import Device, computes_in_half, trained_parameters

FLOAT32_BYTES = 4
BFLOAT16_BYTES = 2
TRAINED_BYTES = 3 * FLOAT32_BYTES
"""Of one trained parameter in a checkpoint: its master weight and AdamW's two moments."""


def check_disk(settings: Settings, student: Path, device: Device) -> None:
    """Check that checkpoints and policies will fit on the disk, if the student's size is known.

    A checkpoint has what is trained, and so has a policy version that is an adapter; beside those
    there is the model under them.

    Raises:
        UserError: the disk of the run directory has less room.
    """
    # One more of each, while it is written.
    checkpoints = settings.checkpoint.keep + 1
    policies = settings.checkpoint.keep_policies + 1
    half = computes_in_half(settings, device)
    model_bytes = parameters(student) * (BFLOAT16_BYTES if half else FLOAT32_BYTES)
    trained = trained_parameters(settings, student)
    checkpoint_bytes = trained * TRAINED_BYTES
    policy_bytes = model_bytes
    base_bytes = 0
    if settings.trainer.lora is not None and settings.weights.transport != "nccl":
        policy_bytes = trained * FLOAT32_BYTES
        base_bytes = model_bytes
    need_bytes = checkpoints * checkpoint_bytes + policies * policy_bytes + base_bytes
    directory = settings.run.dir
    while not directory.exists():
        directory = directory.parent
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < need_bytes:
        raise UserError(
            f"{shown_bytes(free_bytes)} free on the disk of {settings.run.dir}",
            expected=f"{shown_bytes(need_bytes)} for {checkpoints} checkpoints of "
            f"{shown_bytes(checkpoint_bytes)} and {policies} policy versions of "
            f"{shown_bytes(policy_bytes)}"
            + (f" over a base of {shown_bytes(base_bytes)}" if base_bytes else ""),
            next_step="Free space, set run.dir to another disk, or lower checkpoint.keep and "
            "checkpoint.keep_policies.",
        )
