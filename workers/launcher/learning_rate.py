"""What `onstream check` prints of the learning rate, which may follow from the student's shape."""

from __future__ import annotations

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.learning_rate import automatic_rate
from onstream.settings.root import Settings
from onstream.settings.route import taught_by_own_start
from onstream.workers.launcher.model_files import local_model, model_config


def learning_rate_line(settings: Settings) -> str:
    """The rate and its warm-up; with `trainer.optim.lr = "auto"` also why it is that."""
    optim = settings.trainer.optim
    after = f"after {optim.warmup} steps of warm-up" if optim.warmup else "without warm-up"
    if optim.lr != "auto":
        return f"{optim.lr:g} {after}"
    try:
        directory = local_model(settings.model.name, ask_hub=False)
        config = model_config(directory, "model.name") if directory is not None else None
    except UserError:  # told by the checks
        config = None
    if config is None:
        return f'{after}; trainer.optim.lr = "auto", and the student is not on this machine'
    own = taught_by_own_start(settings)
    rate = automatic_rate(config, settings.trainer, from_own_start=own)
    return f'{rate.value:g} {after}; trainer.optim.lr = "auto": {rate.reason}'
