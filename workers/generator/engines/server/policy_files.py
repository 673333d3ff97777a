"""Policy versions as files for the student's servers, however the generator got them."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections import deque
from pathlib import Path

from onstream.pipeline.weights import LoadedPolicy, WeightsError

KEPT = 2
"""Files that stay: the newest, and the one before it, which a slow server may still read."""


class ServerFiles:
    """Files in `directory`, which the servers share.

    None: among the temporary files, for servers on this machine.
    """

    def __init__(self, directory: Path | None, run: str) -> None:
        self._directory = directory
        self._prefix = f"onstream-{run}-{secrets.token_hex(4)}"
        self._files: deque[Path] = deque()  # two for each version: unfinished, and finished

    def put(self, policy: LoadedPolicy) -> Path:
        """A file with the weights of `policy`. A temporary one is removed with `policy`.

        Raises:
            WeightsError: it cannot be written.
        """
        try:
            if self._directory is None:
                return policy.file()
            return self._write(self._directory, policy)
        except OSError as error:
            raise WeightsError(
                f"version {policy.number} cannot be put where the servers read it: {error}"
            ) from error

    def close(self) -> None:
        """Remove all files."""
        self._remove_oldest(keep=0)

    def _write(self, directory: Path, policy: LoadedPolicy) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self._prefix}-{policy.number:06d}-{policy.digest[:12]}.safetensors"
        unfinished = path.with_suffix(".unfinished")
        if path not in self._files:
            self._files += [unfinished, path]
        unfinished.write_bytes(policy.data.data)
        os.replace(unfinished, path)
        self._remove_oldest(keep=2 * KEPT)
        return path

    def _remove_oldest(self, *, keep: int) -> None:
        while len(self._files) > keep:
            with contextlib.suppress(FileNotFoundError):
                self._files.popleft().unlink()
