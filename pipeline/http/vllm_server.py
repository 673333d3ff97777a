"""vLLM's OpenAI server, in the place of the calling process."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from onstream.settings.devices import device_of
from onstream.settings.engines import vllm_environment
from onstream.settings.sections.deployment import DeploymentSettings

# The command `vllm serve` does not start from the wheel for CPUs.
SERVER = "vllm.entrypoints.openai.api_server"


def become_server(
    arguments: Sequence[str],
    deployment: DeploymentSettings,
    variables: Mapping[str, str] | None = None,
) -> NoReturn:
    """Turn this process into the server.

    Of a variable that is set twice, `variables` wins over the environment, and the environment over
    what the device needs.
    """
    environ = vllm_environment(device_of(deployment)) | dict(os.environ) | dict(variables or {})
    os.execve(sys.executable, [sys.executable, "-P", "-m", SERVER, *arguments], environ)
