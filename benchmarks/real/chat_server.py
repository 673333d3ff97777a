"""A vLLM server on this machine's CPU that writes the teacher's text."""

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

from onstream.pipeline.http.vllm_server import SERVER
from onstream.settings.engines import vllm_environment

VLLM = Path(".venv-vllm/bin/python")
CONTEXT_TOKENS = 512
START_S = 900.0  # beside other work it takes minutes


@contextmanager
def chat_server(model: Path, name: str, log: Path) -> Iterator[str]:
    """The base URL of a server of `model`, which it knows by `name`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [VLLM, "-m", SERVER, "--model", model, "--served-model-name", name]
    command += ["--dtype", "bfloat16", "--max-model-len", CONTEXT_TOKENS, "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", port]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("ab") as written,
        subprocess.Popen(
            [str(word) for word in command],
            env=vllm_environment("cpu") | os.environ,
            stdout=written,
            stderr=written,
        ) as server,
    ):
        try:
            _wait(server, port, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until the server is healthy. Raises SystemExit where it ends, or takes too long."""
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    sys.exit(f"the chat server is not up (exit code {server.poll()}): {log} says why")
