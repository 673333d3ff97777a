"""Everything that can be known to be wrong before the first worker starts. Reads files; imports
neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onstream.pipeline.errors import Exit, UserError
from onstream.settings.gpus import gpu_problems
from onstream.settings.plan import Plan, refuse_differences
from onstream.settings.problems import SettingsError
from onstream.settings.root import Settings
from onstream.settings.rules.engines import engine_problems
from onstream.settings.stages import SWITCHES

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
FLOAT32_BYTES = 4
TRAINED_BYTES = (
    3 * FLOAT32_BYTES
)  # of one parameter in a checkpoint: its master weight and AdamW's two moments


def check_gpus(settings: Settings, plan: Plan, gpus: Sequence[str]) -> None:
    """Check that the workers that start here find room on `gpus`, and vLLM where they are to use
    it.

    Raises:
        SettingsError: they do not.
    """
    if problems := engine_problems(settings, plan) + gpu_problems(settings, plan, gpus):
        raise SettingsError(problems)


def check_files(settings: Settings, teacher: str | None) -> None:
    """Check the models, the task and the disk that the run will need.

    Raises:
        UserError: something is missing or unfit.
    """
    student = check_model(settings.model.name, "model.name")
    if teacher is not None and teacher != settings.model.name:
        check_model(teacher, "teacher_inference.model.name")
    check_task(settings)
    check_loss(settings)
    check_disk(settings, student)


def local_model(name: str) -> Path:
    """The directory of a model: itself, or the small files of a hub model, fetched unless they are
    in the local cache.

    Raises:
        UserError: no such directory, or the hub does not give such a model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or (path.parent != Path(".") and path.parent.is_dir())
    ):
        raise UserError(
            f"no model directory {name}",
            expected="a directory in Hugging Face form",
            next_step=_make_hint(path),
        )
    return _hub_files(name)


def _make_hint(path: Path) -> str:
    return f"Check the path, or make the pair of an example with `onstream models make TASK --out {path.parent}`."


def _hub_files(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        pass  # not in the cache: ask the hub
    except HFValidationError as error:
        raise _no_such_model(name, error) from error
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _no_such_model(name, error) from error


def _no_such_model(name: str, error: Exception) -> UserError:
    first_line = next(
        (line for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
    return UserError(
        f"the Hugging Face hub gives no model {name} ({first_line})",
        expected="a directory, a model in the local cache, or a public model id with the hub in reach",
        next_step="Check the name and the network; a gated model needs `hf auth login` first.",
    )


def check_model(name: str, setting: str) -> Path:
    """Check that the model `name`, the value of `setting`, has a tokenizer that knows how to chat;
    returns its directory.

    Raises:
        UserError: there is no such model, a file of it is missing or no JSON, or there is no chat
            template.
    """
    directory = local_model(name)
    _json_file(
        directory / "config.json", setting, "the config.json of a model in Hugging Face form"
    )
    if (
        directory == Path(name).expanduser()
    ):  # a hub model's weights are fetched by whoever loads it first
        weights = parameters(directory) > 0 or any(directory.glob("*.bin"))
        _require(weights, f"{setting}: {directory} has no weights", "a file *.safetensors or *.bin")
    has_tokenizer = any((directory / file).exists() for file in TOKENIZER_FILES)
    _require(
        has_tokenizer,
        f"{setting}: {directory} has no tokenizer",
        f"one of {', '.join(TOKENIZER_FILES)}",
    )
    if not _has_chat_template(directory, setting):
        raise UserError(
            f"{setting}: the tokenizer in {directory} has no chat template",
            expected="a file chat_template.jinja, or `chat_template` in tokenizer_config.json",
            next_step="Use the instruction-tuned variant of the model, or add a chat_template.jinja to its directory.",
        )
    return directory


def _require(holds: bool, got: str, expected: str) -> None:
    if not holds:
        raise UserError(
            got,
            expected=expected,
            next_step="Save model and tokenizer there by `save_pretrained(directory)`.",
        )


def _has_chat_template(directory: Path, setting: str) -> bool:
    if (directory / "chat_template.jinja").exists() or (
        directory / "additional_chat_templates"
    ).is_dir():
        return True
    return bool(
        _json_file(
            directory / "tokenizer_config.json", setting, "the tokenizer's configuration"
        ).get("chat_template")
    )


def _json_file(path: Path, setting: str, expected: str) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{setting}: no file {path}",
            expected=expected,
            next_step="Check the path of the model.",
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{setting}: {path} does not read as JSON ({error})",
            expected=expected,
            next_step="Save the model again.",
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(
            f"{setting}: {path} is no JSON object",
            expected=expected,
            next_step="Save the model again.",
        )
    return loaded


def check_task(settings: Settings) -> None:
    """Load the task and its scorer once, so that a wrong name, file or line is told here.

    Raises:
        UserError: the task cannot be used; the message names the file and line where there is one.
    """
    from onstream.pipeline.tasks import load_scorer, load_task
    from onstream.pipeline.tasks.swapped_images import swapped_problems

    task = load_task(settings)
    task.train(0)
    if settings.eval.samples and settings.eval.swap_images:
        swapped_problems(task)
    if settings.orchestrator.verification.enabled is not False:
        load_scorer(settings)


def check_loss(settings: Settings) -> None:
    """Import a loss of the user's own and try it out, so that what is wrong with it is told here.

    Raises:
        UserError: it cannot be imported, or does not work on a made-up batch.
    """
    if settings.trainer.loss.user_function is None:
        return
    from onstream.workers.trainer.losses import loss_function  # brings torch

    loss_function(settings.trainer.loss)


def check_disk(settings: Settings, student: Path) -> None:
    """Check that checkpoints and policies will fit beside each other, as far as the student's size
    is known here.

    Raises:
        UserError: the disk of the run directory has less room.
    """
    # one more while it is written
    checkpoints = settings.checkpoint.keep + 1
    policies = settings.checkpoint.keep_policies + 1
    need_bytes = parameters(student) * (checkpoints * TRAINED_BYTES + policies * FLOAT32_BYTES)
    directory = settings.run.dir
    while not directory.exists():
        directory = directory.parent
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < need_bytes:
        raise UserError(
            f"{free_bytes / 2**20:,.0f} MiB free on the disk of {settings.run.dir}",
            expected=f"{need_bytes / 2**20:,.0f} MiB for {checkpoints} checkpoints and {policies} policy versions",
            next_step="Free space, set run.dir to another disk, or lower checkpoint.keep and checkpoint.keep_policies.",
        )


def parameters(directory: Path) -> int:
    """Parameters of the safetensors files in `directory`, by their headers; 0 without such files.

    Raises:
        UserError: a file is cut short, or is none.
    """
    return sum(_header_parameters(path) for path in directory.glob("*.safetensors"))


def _header_parameters(path: Path) -> int:
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = file.read(min(header_bytes, path.stat().st_size))
    try:
        tensors = {
            name: entry for name, entry in json.loads(header).items() if name != "__metadata__"
        }
    except ValueError:
        tensors = {}
    expected_bytes = (
        8 + header_bytes + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    )
    if not tensors or path.stat().st_size != expected_bytes:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes and is no whole safetensors file",
            expected=f"{expected_bytes:,} bytes, by its header"
            if tensors
            else "a header and the tensors it tells of",
            next_step="Save or download the model again.",
        )
    return sum(math.prod(entry["shape"]) for entry in tensors.values())


def check_resume(
    settings: Settings, ours: Plan, theirs: Plan | None, in_flight: Callable[[], int]
) -> None:
    """Check `run.resume` against the plan of the run that exists, or None where none does.

    `in_flight` counts the rollouts on their way; they keep the route that they were issued with.

    Raises:
        UserError: the run exists and shall not, or the reverse, or it exists with other settings.
    """
    run_dir = settings.run_dir
    if theirs is None and settings.run.resume == "must":
        raise UserError(
            f'run.resume = "must", but there is no run {run_dir}',
            expected="a run to resume",
            next_step='Check run.name and run.dir, or set run.resume = "auto".',
            exit=Exit.REFUSED,
        )
    if theirs is not None and settings.run.resume == "never":
        raise UserError(
            f'run.resume = "never", but the run {run_dir} exists',
            expected="a new run",
            next_step=f"Choose another run.name, or remove {run_dir}.",
            exit=Exit.REFUSED,
        )
    if theirs is not None:
        _refuse_other_route(ours, theirs, in_flight)
        refuse_differences(ours, theirs)


def _route_hint(ours: Plan, theirs: Plan) -> str:
    """What to set, where leaving a stage out of `deployment.stages` has turned it off."""
    changed = set(ours.route) ^ set(theirs.route)
    return "Set " + " and ".join(
        f"{name} as it was" for stage, name in SWITCHES.items() if stage in changed
    )


def _refuse_other_route(ours: Plan, theirs: Plan, in_flight: Callable[[], int]) -> None:
    if ours.route != theirs.route:
        raise UserError(
            f"the settings route rollouts by {' → '.join(ours.streams)}, but run {theirs.run!r} by {' → '.join(theirs.streams)}, "
            f"with {in_flight()} rollouts in flight on that route",
            expected="the route that the run was started with",
            next_step=f"{_route_hint(ours, theirs)}, or choose another run.name for a new run.",
            exit=Exit.REFUSED,
        )
