"""Refuses weights that pickle wrote: to read them is to run what their file says."""

from __future__ import annotations

from pathlib import Path

from onstream.pipeline.errors import UserError

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refuse_pickle(name: str | Path) -> None:
    """Refuse the directory `name` where all its weights are in pickle.

    Raises:
        UserError: it has no file `*.safetensors`, but some that pickle writes.
    """
    directory = Path(name)
    if not directory.is_dir() or any(directory.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise UserError(
            f"the weights of {directory} are in pickle ({pickled[0]}), which may run any code when "
            "it is read",
            expected="files *.safetensors",
            next_step="If you trust where it is from, save it anew: `AutoModelForCausalLM"
            f".from_pretrained({str(directory)!r}).save_pretrained(…)` writes safetensors. "
            "See docs/security.md.",
        )
