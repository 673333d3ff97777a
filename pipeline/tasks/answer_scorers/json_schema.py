"""The scorer `json-schema`: whether an answer is JSON that a schema accepts."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import msgspec
from jsonschema import Draft202012Validator, SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry

from onstream.pipeline.tasks.scorers import answer_text
from onstream.settings.decoding import UNDECODABLE

_FENCE = re.compile(r"```[ \t]*(?:json)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)


def score(completion: str, info: dict[str, Any]) -> dict[str, float]:
    """1 where the answer is JSON that the schema `info["answer"]`, a JSON text, accepts; else 0.

    The JSON is the last fenced block, or else the whole answer. The part `answered` is 1 where it
    is JSON; it is shown, not rewarded.

    >>> score('{"name": "Ada"}', {"answer": '{"required": ["name"]}'})
    {'reward': 1.0, 'answered': 1.0}

    Raises:
        ValueError: `info["answer"]` is no schema.
    """
    schema = _schema(str(info["answer"]))
    text = answer_text(completion)
    blocks = _FENCE.findall(text)
    try:
        value = msgspec.json.decode(blocks[-1] if blocks else text)
    except UNDECODABLE:
        return {"reward": 0.0, "answered": 0.0}
    try:
        accepted = schema.is_valid(value)
    except RecursionError:  # deeper than the schema can be followed
        accepted = False
    return {"reward": float(accepted), "answered": 1.0}


@lru_cache(maxsize=256)  # the rollouts of a group have one schema
def _schema(text: str) -> Validator:
    try:
        schema = msgspec.json.decode(text)
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
    except (SchemaError, *UNDECODABLE) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the problem's answer is no JSON schema: {reason}") from error
    return kind(schema, registry=Registry())  # an empty one: nothing is fetched for a `$ref`
