"""The engines that write rollouts. A new one is a module, a line in `ENGINES`, and its name.

The name goes to `EngineName` in `settings/sections/inference.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from onstream.pipeline.errors import UserError
from onstream.settings.sections.inference import EngineName


@dataclass(frozen=True)
class EngineSpec:
    """An engine: the module whose `open_engine(student)` opens it, and what must be installed."""

    module: str
    needs: str


_HERE = __name__
ENGINES: dict[EngineName, EngineSpec] = {
    "transformers": EngineSpec(f"{_HERE}.transformers.engine", "transformers and torch"),
    "vllm": EngineSpec(f"{_HERE}.vllm.startup", "vLLM in this environment"),
    "server": EngineSpec(f"{_HERE}.server.engine", "the address of a vLLM server of the student"),
}


def engine_module(name: EngineName) -> ModuleType:
    """The module of the engine `name`, whose `open_engine` opens it.

    Only this engine's module is imported: each of them imports what only it needs.

    Raises:
        UserError: something that the engine needs is not installed.
    """
    spec = ENGINES[name]
    try:
        return import_module(spec.module)
    except ModuleNotFoundError as error:
        raise UserError(
            f'inference.engine = "{name}" cannot be loaded: {error}',
            expected=spec.needs,
            next_step="Install it, or choose another inference.engine.",
        ) from error
