"""Policy versions: how the trainer publishes them, and how a generator gets them, whole or not at
all.
"""

from onstream.pipeline.weights.directory import (
    Directory,
    DirectoryOutlet,
    announced,
    prune,
    publish,
    write_directory,
)
from onstream.pipeline.weights.parts import Outlet, Part, Shelf, Version
from onstream.pipeline.weights.policy import LoadedPolicy, WeightsError, read_file
from onstream.pipeline.weights.reader import Reader
from onstream.pipeline.weights.sender import Sender, Sent

__all__ = [
    "Directory",
    "DirectoryOutlet",
    "LoadedPolicy",
    "Outlet",
    "Part",
    "Reader",
    "Sender",
    "Sent",
    "Shelf",
    "Version",
    "WeightsError",
    "announced",
    "prune",
    "publish",
    "read_file",
    "write_directory",
]
