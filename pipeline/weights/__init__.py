"""Policy versions: how the trainer publishes them, and how a generator gets them, whole or not at all."""

from pipeline.weights.directory import Directory, prune, publish
from pipeline.weights.policy import LoadedPolicy, WeightsError, WeightsReader, read_file

__all__ = ["Directory", "LoadedPolicy", "WeightsError", "WeightsReader", "prune", "publish", "read_file"]
