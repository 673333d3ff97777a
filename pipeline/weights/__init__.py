"""Policy versions: how the trainer publishes them, and how a generator gets each of them whole."""

from onstream.pipeline.weights.adapter import LowRank
from onstream.pipeline.weights.directory_store import (
    DirectoryReader,
    DirectoryWriter,
    announced,
    prune,
    publish,
    write_directory,
)
from onstream.pipeline.weights.fetcher import PolicyFetcher
from onstream.pipeline.weights.packer import PolicyPacker
from onstream.pipeline.weights.policy import LoadedPolicy, WeightsError, WeightSum, read_file
from onstream.pipeline.weights.sender import PolicySender, SendResult
from onstream.pipeline.weights.store import StoreReader, StoreWriter, VersionId, WeightPart

__all__ = [
    "DirectoryReader",
    "DirectoryWriter",
    "LoadedPolicy",
    "LowRank",
    "PolicyFetcher",
    "PolicyPacker",
    "PolicySender",
    "SendResult",
    "StoreReader",
    "StoreWriter",
    "VersionId",
    "WeightPart",
    "WeightSum",
    "WeightsError",
    "announced",
    "prune",
    "publish",
    "read_file",
    "write_directory",
]
