"""On-policy distillation of small language models as an asynchronous pipeline over Redis Streams.

The packages `settings`, `pipeline` and `workers` lie at the top of the repository, and this folder
links to them: one name to import, which the build, an editable install, type checkers and editors
all find without a rule of their own.

What is here by name is the Python interface; docs/python.md describes it. Each name is imported
when it is used first, so that `import onstream` itself loads nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onstream.pipeline.errors import UserError
    from onstream.settings.load import load_settings
    from onstream.settings.root import Settings
    from onstream.workers.api.run import Rows, Run
    from onstream.workers.api.up import up

__all__ = ["Rows", "Run", "Settings", "UserError", "load_settings", "up"]

_MODULES = {
    "Rows": "onstream.workers.api.run",
    "Run": "onstream.workers.api.run",
    "Settings": "onstream.settings.root",
    "UserError": "onstream.pipeline.errors",
    "load_settings": "onstream.settings.load",
    "up": "onstream.workers.api.up",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
