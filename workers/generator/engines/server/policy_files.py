"""Where the servers of the student find a policy version: a file that the generator puts there, by
whatever transport it came.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections import deque
from pathlib import Path

from onstream.pipeline.weights import LoadedPolicy, WeightsError

KEPT = 2
"""Files that stay: the newest, and the one before, which a server that is slow may still be
reading.
"""


class ServerFiles:
    """Files in `directory`, which the servers share; None: where temporary files go, for servers on
    this machine.
    """

    def __init__(self, directory: Path | None, run: str) -> None:
        self._directory = directory
        self._prefix = f"onstream-{run}-{secrets.token_hex(4)}"
        self._files: deque[Path] = deque()

    def put(self, policy: LoadedPolicy) -> Path:
        """A file with the weights of `policy`, whole or not there; a temporary one goes when
        `policy` does.

        Raises:
            WeightsError: it cannot be written.
        """
        try:
            return (
                policy.file() if self._directory is None else self._written(self._directory, policy)
            )
        except OSError as error:
            raise WeightsError(
                f"version {policy.number} cannot be put where the servers read it: {error}"
            ) from error

    def close(self) -> None:
        """Remove them all."""
        self._forget(0)

    def _written(self, directory: Path, policy: LoadedPolicy) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self._prefix}-{policy.number:06d}-{policy.digest[:12]}.safetensors"
        unfinished = path.with_suffix(".unfinished")
        self._files += [unfinished, path] if path not in self._files else []
        unfinished.write_bytes(policy.data.data)
        os.replace(unfinished, path)
        self._forget(2 * KEPT)
        return path

    def _forget(self, keep: int) -> None:
        while len(self._files) > keep:
            with contextlib.suppress(FileNotFoundError):
                self._files.popleft().unlink()
