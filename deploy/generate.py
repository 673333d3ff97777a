"""Writes what follows from other files: the settings' names in compose.yaml, and deploy/stack.yaml.

`python -m onstream.settings.docs` calls it.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import yaml

from onstream.settings.fields import NAME, known
from onstream.settings.problems import variable_of

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "compose.yaml"
STACK = ROOT / "deploy" / "stack.yaml"
OURS = re.compile(
    r"run\.dir|redis\.(url|password|tls_.*|server_bin|shut_down|max_memory)"
    r"|deployment\.(workers\..*|stages|started_elsewhere)"
)
"""What compose.yaml itself decides, and where it mounts things."""
WIDTH = 140
MERGED = "all-settings"
HEAD = """# The services of compose.yaml for a Swarm (docs/deploy.md):
# `docker stack deploy -c deploy/stack.yaml onstream`
# Written from compose.yaml by `python -m onstream.settings.docs`; edit that.
"""
SECRET = "/run/secrets/redis-password"
SETTINGS_FILE = "/app/run.toml"
KEPT = (
    "image",
    "user",
    "init",
    "stop_grace_period",
    "cap_drop",
    "entrypoint",
    "command",
    "environment",
    "healthcheck",
    "working_dir",
    "logging",
)
HOME = {"constraints": ["node.labels.onstream == home"]}
"""The node with the data of Redis and the run's directory, which the trainer and the jobs use."""
VOLUMES = {
    "redis": ["redis:/data"],
    "trainer": ["runs:/app/runs", "hub:/home/onstream/hub"],
    "jobs": ["runs:/app/runs", "hub:/home/onstream/hub"],
}


def passed_on() -> list[str]:
    """The variables that compose.yaml passes from the user's environment to every container: no
    secrets are among them.
    """
    return [
        variable_of(name)
        for name, setting in known().items()
        if not setting.secret and NAME not in name and not OURS.fullmatch(name)
    ]


def settings_block() -> str:
    """`passed_on()` as the flow mapping in compose.yaml, whose values are all null."""
    lines = textwrap.fill(
        ", ".join(passed_on()),
        WIDTH,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
    )
    return f"x-settings: &settings {{\n{lines}\n}}\n"


def with_settings(compose: str) -> str:
    """The text of compose.yaml with the settings of now."""
    return re.sub(
        r"^x-settings: &settings \{.*?^\}\n",
        settings_block(),
        compose,
        flags=re.DOTALL | re.MULTILINE,
    )


def stack(compose: str) -> str:
    """The text of stack.yaml that follows from that of compose.yaml.

    A Swarm has no order of starting, no `restart`, no profiles and no builds; it has secrets and
    configs, and its nodes share no disk: so weights go through Redis, and the settings file is a
    config.
    """
    services = yaml.safe_load(compose)["services"]
    made = {
        name: _service(name, service)
        for name, service in services.items()
        if name not in ("prepare", "status", "metrics")
    }
    whole = {
        "services": made,
        "networks": {"default": {"driver": "overlay", "driver_opts": {"encrypted": "true"}}},
        "secrets": {"redis-password": {"external": True}},
        "configs": {"settings": {"file": "${SETTINGS:-../examples/reverse-text/onstream.toml}"}},
        "volumes": {"redis": None, "runs": None, "hub": None},
    }
    text = yaml.dump(whole, sort_keys=False, width=WIDTH, allow_unicode=True, Dumper=_Plain)
    return (
        HEAD
        + 'version: "3.8"\n'
        + settings_block()
        + text.replace(f"{MERGED}: null", "<<: *settings")
    )


class _Plain(yaml.SafeDumper):
    """Writes shared parts out, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _service(name: str, service: dict[str, Any]) -> dict[str, Any]:
    made = {key: service[key] for key in KEPT if key in service}
    made["deploy"] = _placement(name, service)
    made["secrets"] = [{"source": "redis-password", "mode": 0o444}]
    made["volumes"] = VOLUMES.get(name, ["hub:/home/onstream/hub"])
    made["healthcheck"] = {**service["healthcheck"], "test": _moved(service["healthcheck"]["test"])}
    made["command"] = _moved(service["command"])
    if name == "redis":
        made["user"] = "${REDIS_USER:-999:999}"  # whose /data is in Redis' own image
        return made
    made["configs"] = [{"source": "settings", "target": SETTINGS_FILE}]
    made["environment"] = _environment(name, service["environment"])
    return made


def _environment(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The environment of the service `name`, but for what all services are passed."""
    environment: dict[str, Any] = {MERGED: None}
    for key, value in given.items():
        # API keys come from the environment of `docker stack deploy`.
        if key not in passed_on() and not key.endswith("_API_KEY_FILE"):
            environment[key] = value
    environment["ONSTREAM_REDIS__PASSWORD_FILE"] = SECRET
    environment["ONSTREAM_WEIGHTS__TRANSPORT"] = "${ONSTREAM_WEIGHTS__TRANSPORT:-redis}"
    if name == "trainer":
        environment["ONSTREAM_REDIS__SHUT_DOWN"] = "false"
    return environment


def _placement(name: str, service: dict[str, Any]) -> dict[str, Any]:
    replicas = service.get("scale", 1)
    if "profiles" in service:  # a Swarm has none: what compose.yaml leaves out has no replicas
        replicas = replicas.replace(":-1}", ":-0}")
    placement = {
        "replicas": replicas,
        "restart_policy": {"condition": "on-failure", "delay": "2s"},
    }
    if name in VOLUMES:
        placement["placement"] = HOME
    return placement


def _moved(part: Any) -> Any:
    """`part` of a service with the places that its secret and its settings file have in a Swarm."""
    if isinstance(part, list):
        return [_moved(item) for item in part]
    return re.sub(
        r"^\$\{SETTINGS:-.*\}$", SETTINGS_FILE, part.replace("/run/onstream/redis-password", SECRET)
    )


def main() -> None:
    """Write the files."""
    compose = with_settings(COMPOSE.read_text())
    COMPOSE.write_text(compose)
    STACK.write_text(stack(compose))


if __name__ == "__main__":
    main()
