"""A vLLM server of the student, for the engine `server`: what it is started with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from onstream.pipeline.http.vllm_server import become_server
from onstream.pipeline.models.tokenizer import has_states, has_vision, load_configs
from onstream.settings.root import Settings
from onstream.workers.generator.engines.vllm.startup import arguments as engine_arguments

BACKEND = "disk"  # as vllm.extension registers it, which cannot be imported without vLLM
UPDATES = {"VLLM_SERVER_DEV_MODE": "1"}
"""Opens the routes that replace weights. They ask for no key: who reaches the port can use them."""
NOT_OF_SERVERS = ("skip_tokenizer_init", "disable_log_stats", "distributed_executor_backend")


def serve(settings: Settings, host: str, port: int) -> NoReturn:
    """Turn this process into the server, at `host` and `port`.

    Raises:
        UserError: there is no such model.
    """
    config, _ = load_configs(settings.model.name)
    given = arguments(settings, host, port, images=has_vision(config), states=has_states(config))
    become_server(given, settings.deployment, UPDATES)


def arguments(
    settings: Settings, host: str, port: int, *, images: bool = False, states: bool = False
) -> list[str]:
    """The server's arguments: the engine's, and what opens it to a generator.

    `images` and `states` are those of the engine's.
    """
    stated = {
        name: value
        for name, value in engine_arguments(settings, images=images, states=states).items()
        if name not in NOT_OF_SERVERS
    }
    stated |= {
        "served_model_name": settings.inference.client.model or settings.model.name,
        "host": host,
        "port": port,
        "enable_scale_out": True,  # the route that takes and gives token ids
        "weight_transfer_config": {"backend": BACKEND},
    }
    return [part for name, value in stated.items() for part in _flag(name, value)]


def _flag(name: str, value: Any) -> Iterator[str]:
    """An engine argument as vLLM's command line takes it.

    >>> [*_flag("enforce_eager", False), *_flag("max_num_seqs", 8)]
    ['--no-enforce-eager', '--max-num-seqs', '8']
    """
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        yield f"--{dashed}" if value else f"--no-{dashed}"
        return
    yield f"--{dashed}"
    yield json.dumps(value) if isinstance(value, dict | list) else str(value)
