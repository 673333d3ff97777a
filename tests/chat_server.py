"""A real OpenAI-compatible chat server: `transformers serve` with a model directory, on a free port
of this machine.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

START_S = 120


@contextmanager
def chat_server(model: Path, directory: Path, *options: str) -> Iterator[str]:
    """The base URL of a server of `model`, which it knows by that path; its log and an empty model
    cache lie in `directory`.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    cache = directory / "hub"
    cache.mkdir()
    command = [
        Path(sys.executable).with_name("transformers"),
        "serve",
        model,
        "--port",
        str(port),
        "--device",
        "cpu",
        *options,
    ]
    environ = {
        **os.environ,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with (
        (directory / "serve.log").open("wb") as log,
        subprocess.Popen(command, env=environ, stdout=log, stderr=log) as server,
    ):
        try:
            _wait(f"http://localhost:{port}/health", server, directory / "serve.log")
            yield f"http://localhost:{port}/v1"
        finally:
            server.terminate()


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            if httpx.get(url).is_success:
                return
        except httpx.TransportError:
            pass
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(
                f"the chat server is not up (exit {server.poll()}): {log.read_text()[-2000:]}"
            )
        time.sleep(0.1)
