"""Whether records that wait for a checkpoint have room: told before the trainer starts."""

from __future__ import annotations

from onstream.pipeline.errors import UserError
from onstream.settings.record_sizes import record_sizes
from onstream.settings.root import Settings
from onstream.settings.toml import shown_bytes
from onstream.workers.launcher.model_files import local_model, model_config


def check_unacked(settings: Settings) -> None:
    """Check that a batch with images may wait for its checkpoint, where the student reads images.

    Other records do not wait: `checkpoint.max_unacked_bytes` says nothing of them.

    Raises:
        UserError: it is given, and less than one batch at its longest.
    """
    given = settings.checkpoint.max_unacked_bytes
    sizes = record_sizes(settings)
    if given is None or given >= sizes.batch_bytes or not _reads_images(settings.model.name):
        return
    raise UserError(
        f"checkpoint.max_unacked_bytes = {given}, and the student reads images",
        expected=f"{sizes.batch_bytes} or more: one batch of rollouts, each of up to "
        f"{shown_bytes(sizes.rollout_bytes)}, waits for a checkpoint in Redis",
        next_step=f"Leave checkpoint.max_unacked_bytes out (it is then {sizes.max_unacked_bytes}), "
        "or lower inference.sampling.max_completion or orchestrator.batch_size.",
    )


def _reads_images(student: str) -> bool:
    """Whether a student that is on this machine reads images."""
    directory = local_model(student, ask_hub=False)
    return directory is not None and "vision_config" in model_config(directory, "model.name")
