"""Lets torchvision load beside a torch that was built for CPUs. On PYTHONPATH, so that every
process of a test has it.

The torchvision wheel of the package index is built for CUDA: beside a CPU build of torch its
operators do not load, and its import dies declaring the shapes of two of them. Image processors
need none, so the two are declared before that import.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any


class _Declare(MetaPathFinder):
    """Sees that torchvision is about to be imported, and steps aside."""

    def find_spec(
        self, name: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            _declare_what_does_not_load(find_spec(name))
        return None


def _declare_what_does_not_load(torchvision: ModuleSpec | None) -> None:
    if torchvision is None or torchvision.origin is None:
        return
    import torch

    try:
        torch.ops.load_library(Path(torchvision.origin).with_name("_C.so"))
    except OSError:
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )


sys.meta_path.insert(0, _Declare())
