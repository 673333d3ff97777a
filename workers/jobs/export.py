"""Exports: a policy version of a run as a model directory with whole weights, and its upload."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from onstream.pipeline.errors import UserError
from onstream.pipeline.weights.merging import is_adapter, write_whole
from onstream.settings.root import Settings
from onstream.workers.evaluation.versions import find_version

OUTPUT_KEPT_BYTES = 2000
NOT_THE_MODELS = ("optimizer.pt", "trainer.json", "manifest.json")


def export(settings: Settings, version: int | None, out: Path) -> int:
    """Write `version` (by default the newest on disk) to `out` as Hugging Face files.

    Returns its number. An adapter is merged into its base.

    Raises:
        UserError: the run has no such version, `out` is there already, the model cannot be
            loaded, or the base of an adapter is not there.
    """
    if out.exists():
        raise UserError(
            f"{out} exists",
            expected="a directory to be made",
            next_step="Choose another --out, or remove it.",
        )
    directory, version = find_version(settings, version)
    if not directory.is_dir():
        raise UserError(
            f"version {version} is the student's start {directory}, which the run keeps no copy of",
            expected="a version that was trained, or a student in a directory",
            next_step="Give --version.",
        )
    from onstream.pipeline.models.loading import base_of  # brings torch
    from onstream.workers.trainer.lora import write_merged

    if is_adapter(directory):
        write_whole(directory, out)
    elif base_of(directory):
        write_merged(directory, out)
    else:
        shutil.copytree(directory, out, ignore=shutil.ignore_patterns(*NOT_THE_MODELS))
    return version


def write_export(settings: Settings, version: int, out: Path, dtype: str | None) -> None:
    """Write `version` to `out`, whole or not at all, cast to `dtype` if one is given.

    Raises:
        UserError: as `export`.
    """
    if out.exists():
        raise UserError(
            f"{out} exists",
            expected="a directory to be made",
            next_step="Choose another one, or remove it.",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a try that was killed
    export(settings, version, partial)
    if dtype is not None:
        _cast(partial, dtype)
    partial.rename(out)


def _cast(directory: Path, dtype: str) -> None:
    """Cast the weights in `directory`, and note `dtype` in its configuration."""
    import torch
    from safetensors.torch import load_file, save_file

    target = getattr(torch, dtype)
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.to(target)
        path.unlink()  # it may be a link to the published file
        save_file(tensors, path, metadata={"format": "pt"})
    config = directory / "config.json"
    fields = {**msgspec.json.decode(config.read_bytes()), "dtype": dtype}
    config.unlink()
    config.write_bytes(msgspec.json.format(msgspec.json.encode(fields), indent=2))


def run_upload(command: Sequence[str], path: Path, run: str, version: int) -> str:
    """Run the upload command; returns the end of its output.

    Raises:
        UserError: it cannot be run.
        RuntimeError: it failed.
    """
    values = {"{path}": str(path), "{run}": run, "{version}": str(version)}
    words = [_filled(word, values) for word in command]
    with tempfile.TemporaryFile() as file:
        try:
            code = subprocess.run(
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
            ).returncode
        except OSError as error:
            raise UserError(
                f"jobs.upload: {error}",
                expected="a command that can be run",
                next_step="Correct jobs.upload.",
            ) from error
        file.seek(max(0, file.tell() - OUTPUT_KEPT_BYTES))
        output = file.read().decode(errors="replace").strip()
    if code:
        raise RuntimeError(f"jobs.upload ended with {code}: {output[-200:]}")
    return output


def _filled(word: str, values: dict[str, str]) -> str:
    for placeholder, value in values.items():
        word = word.replace(placeholder, value)
    return word
