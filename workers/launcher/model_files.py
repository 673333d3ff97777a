"""The files of a model: found, looked at without loading it, and refused where some are missing.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from onstream.pipeline.errors import UserError, looked_in
from onstream.pipeline.models.chat_template import NO_TEMPLATE
from onstream.pipeline.models.pickled import refuse_pickle

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
HUB_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""What is fetched of a hub model to look at it: all but its weights."""


def local_model(name: str, *, ask_hub: bool = True) -> Path | None:
    """The directory of a model: itself, or the small files of a hub model.

    Those are fetched unless they are in the local cache. Without `ask_hub` they are not: then
    nothing is known of a hub model that is not there, and the result is None.

    Raises:
        UserError: no such directory, or the hub does not give such a model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    in_a_directory = path.parent != Path(".") and path.parent.is_dir()
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or in_a_directory:
        raise UserError(
            f"no model directory {name}{looked_in(path)}",
            expected="a directory in Hugging Face form",
            next_step="Check the path, or make the pair of an example with "
            f"`onstream models make TASK --out {path.parent}`.",
        )
    return _hub_files(name, ask_hub=ask_hub)


def _hub_files(name: str, *, ask_hub: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = list(HUB_FILES)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        pass  # not in the cache: ask the hub
    except HFValidationError as error:
        raise _no_such_model(name, error) from error
    if not ask_hub:
        return None
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _no_such_model(name, error) from error


def _no_such_model(name: str, error: Exception) -> UserError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    return UserError(
        f"the Hugging Face hub gives no model {name} ({reason})",
        expected="a directory, a model in the local cache, or a public model of a hub in reach",
        next_step="Check the name and the network; a gated model needs `hf auth login` first.",
    )


def check_model(
    name: str, setting: str, *, ask_hub: bool = True, own_template: bool = True
) -> Path | None:
    """Check that the model `name`, the value of `setting`, has weights and a tokenizer for chat.

    Without `own_template` it need not have a chat template. Returns its directory; None for a hub
    model that is not in the local cache, without `ask_hub`.

    Raises:
        UserError: there is no such model, a file of it is missing or no JSON, or there is no chat
            template.
    """
    directory = local_model(name, ask_hub=ask_hub)
    if directory is None:
        return None
    model_config(directory, setting)
    # A hub model's weights are fetched later, by whoever loads it first.
    if directory == Path(name).expanduser():
        refuse_pickle(directory)
        weights = parameters(directory) > 0
        _require(weights, f"{setting}: {directory} has no weights", "a file *.safetensors")
    has_tokenizer = any((directory / file).exists() for file in TOKENIZER_FILES)
    expected = f"one of {', '.join(TOKENIZER_FILES)}"
    _require(has_tokenizer, f"{setting}: {directory} has no tokenizer", expected)
    if own_template:
        _require_chat_template(directory, setting)
    return directory


def check_chat_template(named: str, *, ask_hub: bool = True) -> None:
    """Check that `model.chat_template` names a Jinja file, or a model with a chat template.

    Raises:
        UserError: it does neither.
    """
    if Path(named).expanduser().is_file():
        return
    directory = local_model(named, ask_hub=ask_hub)
    if directory is not None:
        _require_chat_template(directory, "model.chat_template")


def chat_templates(named: str) -> dict[str, str]:
    """The chat templates of a model, or that in a file, as text by name; none where it has none."""
    path = Path(named).expanduser()
    if path.is_file():
        return {"default": path.read_text(encoding="utf-8")}
    try:
        directory = local_model(named, ask_hub=False)
        if directory is None:
            return {}
        setting = json_file(directory / "tokenizer_config.json", named, "").get("chat_template")
    except UserError:  # told by the checks
        return {}
    found: dict[str, str] = {"default": setting} if isinstance(setting, str) else {}
    if isinstance(setting, list):
        found = {one["name"]: one["template"] for one in setting}
    files = [*directory.glob("chat_template.jinja"), *directory.glob("additional_chat_templates/*")]
    return found | {str(file): file.read_text(encoding="utf-8") for file in files}


def _require_chat_template(directory: Path, setting: str) -> None:
    if not _has_chat_template(directory, setting):
        raise UserError(
            f"{setting}: the tokenizer in {directory} has no chat template",
            expected="a file chat_template.jinja, or `chat_template` in tokenizer_config.json",
            next_step=NO_TEMPLATE,
        )


def _require(holds: bool, got: str, expected: str) -> None:
    if not holds:
        raise UserError(
            got,
            expected=expected,
            next_step="Save model and tokenizer there by `save_pretrained(directory)`.",
        )


def _has_chat_template(directory: Path, setting: str) -> bool:
    several = (directory / "additional_chat_templates").is_dir()
    if several or (directory / "chat_template.jinja").exists():
        return True
    path = directory / "tokenizer_config.json"
    return bool(json_file(path, setting, "the tokenizer's configuration").get("chat_template"))


def json_file(path: Path, setting: str, expected: str) -> dict[str, Any]:
    """The JSON object in a file of the model that `setting` names.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
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


def model_config(directory: Path, setting: str) -> dict[str, Any]:
    """The `config.json` of the model in `directory`, the value of `setting`.

    Raises:
        UserError: it cannot be read.
    """
    expected = "the config.json of a model in Hugging Face form"
    return json_file(directory / "config.json", setting, expected)


def context_tokens(directory: Path, setting: str) -> int | None:
    """The longest sequence that the model in `directory` reads; None where it does not say.

    Raises:
        UserError: its configuration cannot be read.
    """
    config = model_config(directory, setting)
    text = config.get("text_config")
    for part in (text if isinstance(text, dict) else {}, config):
        if isinstance(part.get("max_position_embeddings"), int):
            return int(part["max_position_embeddings"])
    return None


def parameters(directory: Path) -> int:
    """Parameters of the safetensors files in `directory`, by their headers; 0 without such files.

    Raises:
        UserError: a file is cut short, or is none.
    """
    return sum(_header_parameters(path) for path in directory.glob("*.safetensors"))


def _header_parameters(path: Path) -> int:
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = file.read(min(header_bytes, size_bytes))
    try:
        tensors: dict[str, Any] = json.loads(header)
    except ValueError:
        tensors = {}
    tensors.pop("__metadata__", None)
    ends = [tensor["data_offsets"][1] for tensor in tensors.values()]
    expected_bytes = 8 + header_bytes + max(ends, default=0)
    if not tensors or size_bytes != expected_bytes:
        by_header = f"{expected_bytes:,} bytes, by its header"
        raise UserError(
            f"{path} has {size_bytes:,} bytes and is no whole safetensors file",
            expected=by_header if tensors else "a header and the tensors it names",
            next_step="Save or download the model again.",
        )
    return sum(math.prod(tensor["shape"]) for tensor in tensors.values())
