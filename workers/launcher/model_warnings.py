"""What is worth knowing of a run's models before it starts, and does not keep it from starting.

It is read from the models' files, as far as they are on this machine. Imports neither torch nor
transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.chat_template import (
    tail_of_answer,
    unread_arguments,
    unread_warning,
)
from onstream.settings.chat_templates import TEACHER_ARGUMENTS
from onstream.settings.engines import student_engine
from onstream.settings.root import Settings
from onstream.settings.route import rollout_teacher
from onstream.workers.launcher.model_files import chat_templates, json_file, local_model


def model_warnings(settings: Settings) -> Iterator[str]:
    """What is worth knowing of the run's models, as far as their files are on this machine."""
    yield from _template_warnings(settings)
    yield from _end_warnings(settings)
    yield from _decoding_warnings(settings)


def _decoding_warnings(settings: Settings) -> Iterator[str]:
    """That the built-in engine decodes the student more slowly, where its configuration tells."""
    if student_engine(settings) != "transformers" or rollout_teacher(settings) is not None:
        return
    try:
        directory = local_model(settings.model.name, ask_hub=False)
        config = json_file(directory / "config.json", "model.name", "") if directory else {}
    except UserError:  # told by the checks
        return
    text = config.get("text_config")
    named = text if isinstance(text, dict) else config
    kinds = set(named.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        yield (
            f"{settings.model.name} has layers of {', '.join(sorted(kinds))}: the built-in engine "
            "decodes it through its own cache, which is exact, and slower than from slots; "
            'inference.engine = "vllm" is faster where vLLM has the model'
        )


def _template_warnings(settings: Settings) -> Iterator[str]:
    """Variables that are set, and that the chat template does not read.

    Nothing of templates that are not on this machine.
    """
    student = settings.model
    teacher = settings.teacher_inference.model
    yield from _unread(
        "model.chat_template_kwargs",
        student.chat_template or student.name,
        student.chat_template_kwargs,
    )
    if teacher.name is not None:
        yield from _unread(TEACHER_ARGUMENTS[0], teacher.name, teacher.chat_template_kwargs)


def _unread(setting: str, model: str, arguments: Mapping[str, Any] | None) -> Iterator[str]:
    templates = chat_templates(model) if arguments else {}
    if templates and (unread := unread_arguments(templates, arguments or {})):
        yield unread_warning(setting, model, unread)


def _end_warnings(settings: Settings) -> Iterator[str]:
    """That the student does not stop where its chat template ends an answer.

    Workers refuse it when they start, by the tokenizer itself.
    """
    model = settings.model
    templates = chat_templates(model.chat_template or model.name)
    directory = _directory_of(model.name)
    if not templates or directory is None:
        return
    tokens = _special_tokens(directory)
    stops = [*model.end_tokens, *_own_ends(directory, tokens)]
    template = list(templates.values())[-1]
    variables = {"eos_token": stops[0] if stops else "", "bos_token": ""}
    tail = tail_of_answer(template, {**variables, **model.chat_template_kwargs})
    ends = sorted((token for token in tokens.values() if token in tail), key=tail.index)
    if ends and not any(stop in tail for stop in stops):
        yield (
            f"{model.name}: the chat template ends an answer with {ends[0]}, where the student "
            f'does not stop; set model.end_tokens = ["{ends[0]}"]'
        )


def _directory_of(name: str) -> Path | None:
    """Where the model's files are; None where they are not here, which the checks tell."""
    try:
        return local_model(name, ask_hub=False)
    except UserError:
        return None


def _special_tokens(directory: Path) -> dict[int, str]:
    """The special tokens of a model's tokenizer, by id."""
    added = _json_or_empty(directory / "tokenizer.json").get("added_tokens") or []
    listed = _json_or_empty(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
    tokens = [*added, *({"id": token, **one} for token, one in listed.items())]
    return {int(token["id"]): token["content"] for token in tokens if token.get("special")}


def _own_ends(directory: Path, tokens: Mapping[int, str]) -> list[str]:
    """The tokens at which a model's own files say that it stops; the tokenizer's first."""
    named = _json_or_empty(directory / "tokenizer_config.json").get("eos_token")
    ends = [named["content"] if isinstance(named, dict) else named] if named else []
    config = _json_or_empty(directory / "config.json")
    parts = (
        config,
        config.get("text_config"),
        _json_or_empty(directory / "generation_config.json"),
    )
    for part in parts:
        ids = part.get("eos_token_id") if isinstance(part, dict) else None
        listed = ids if isinstance(ids, list) else [ids]
        ends += [text for token, text in tokens.items() if token in listed]
    return ends


def _json_or_empty(path: Path) -> dict[str, Any]:
    try:
        return json_file(path, "model.name", "")
    except UserError:  # told by the checks, where the file is needed
        return {}
