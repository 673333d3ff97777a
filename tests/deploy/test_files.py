"""The files to deploy by: whole, current, and right by the schemas of those who read them."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from deploy import generate
from onstream.pipeline.redis.keys import GROUP, Keys
from onstream.settings.fields import NAME, known
from onstream.settings.load import load_settings
from onstream.settings.problems import variable_of
from onstream.settings.sections.deployment import count_name
from onstream.settings.stages import STAGE_OF

ROOT = Path(__file__).parents[2]
COMPOSE_FILES = [*sorted(ROOT.glob("compose*.yaml")), ROOT / "deploy/stack.yaml"]
MANIFESTS = sorted((ROOT / "deploy/k8s").glob("*.yaml"))
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
WORKERS = (
    "trainer",
    "generator",
    "environment",
    "verifier",
    "teacher",
    "teacher-external",
    "jobs",
    "status",
    "metrics",
)
KUBERNETES = "1.31"


def objects(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


def all_objects(kind: str) -> list[dict[str, Any]]:
    return [each for each in chain.from_iterable(map(objects, MANIFESTS)) if each["kind"] == kind]


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_a_compose_file_keeps_to_the_compose_spec(path: Path) -> None:
    schema = json.loads(
        (files("check_jsonschema.builtin_schemas.vendor") / "compose-spec.json").read_text()
    )
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)


def schemas_known(each: dict[str, Any]) -> bool:
    """Whether a package ships the schema: not that of kustomize's own file, nor KEDA's."""
    return "kustomize" not in each["apiVersion"] and "keda" not in each["apiVersion"]


@pytest.mark.parametrize(
    "path",
    [path for path in MANIFESTS if any(map(schemas_known, objects(path)))],
    ids=lambda path: path.name,
)
def test_the_manifests_keep_to_the_schema_of_kubernetes(path: Path) -> None:
    for each in filter(schemas_known, objects(path)):
        kubernetes_validate.validate(each, KUBERNETES, strict=True)


def test_the_settings_in_compose_and_the_stack_are_those_of_now() -> None:
    compose = generate.COMPOSE.read_text()
    assert generate.with_settings(compose) == compose, "run `python -m onstream.settings.docs`"
    assert generate.stack(compose) == generate.STACK.read_text(), (
        "run `python -m onstream.settings.docs`"
    )


def test_every_setting_reaches_every_worker_but_for_secrets_and_what_compose_decides() -> None:
    for service in WORKERS:
        # Those of a section that the user names are in the settings file alone.
        missing = {variable_of(name) for name in known() if NAME not in name} - set(
            SERVICES[service]["environment"]
        )
        assert all(
            re.search(
                r"REDIS|STAGES|RUN__DIR|API_KEY|HEADERS",
                name,
            )
            for name in missing
        ), missing


def test_a_secret_of_an_endpoint_reaches_the_one_service_that_asks_it() -> None:
    secrets = {
        variable_of(name)
        for name, setting in known().items()
        if setting.secret and not name.startswith("redis.")
    }
    has = {
        service: {name.removesuffix("_FILE") for name in SERVICES[service]["environment"]} & secrets
        for service in WORKERS
    }
    holders = {name: [service for service in WORKERS if name in has[service]] for name in secrets}
    expected = {"TEACHER_MODEL": ["teacher-external"], "TEACHER_ROLLOUT_MODEL": ["generator"]}
    assert holders
    for name, services in holders.items():
        section = next((section for section in reversed(expected) if f"__{section}__" in name), "")
        assert services == expected.get(section, []), name


def test_redis_is_published_by_one_file_alone_and_its_password_is_in_no_file() -> None:
    publishing = [
        path.name
        for path in COMPOSE_FILES
        if any("ports" in s for s in yaml.safe_load(path.read_text())["services"].values())
    ]
    assert publishing == ["compose.publish.yaml"]
    assert [
        name
        for name, service in SERVICES.items()
        if "REDIS_PASSWORD" in service.get("environment", {})
    ] == ["prepare"]


def test_the_default_services_carry_no_profile_and_may_be_scaled_to_none() -> None:
    profiles = {
        name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service
    }
    assert profiles == {
        "environment": ["environment"],
        "teacher-external": ["teacher-external"],
        "status": ["monitoring"],
        "metrics": ["metrics"],
    }
    scaled = {name: service["scale"] for name, service in SERVICES.items() if "scale" in service}
    assert set(scaled) == set(WORKERS) - {"trainer", "status", "metrics"}
    for kind, scale in scaled.items():
        variable = variable_of(f"deployment.workers.{count_name(kind)}")
        assert SERVICES["trainer"]["environment"][variable] == scale, (
            "one variable says how many there are, and whether there are any"
        )


def test_the_example_of_the_environment_names_every_variable_with_its_default() -> None:
    text = (ROOT / ".env.example").read_text()
    named = {
        name: value.split("  ")[0].split(" #")[0].strip()
        for name, value in re.findall(r"^#([A-Z_0-9]+)=(.*)$", text, re.MULTILINE)
    }
    used: dict[str, str] = {}
    for path in COMPOSE_FILES[:-1]:
        used |= dict(re.findall(r"\$\{([A-Z_0-9]+):-([^}]*)\}", path.read_text()))
    for name in ("TLS", "REDIS_ADDRESS", "REDIS_PORT"):
        used.pop(name)  # of the files for several machines; docs/deploy.md has them
    assert set(used) <= set(named)
    ours = {name: value for name, value in used.items() if name != "REDIS_URL"}
    assert {name: named[name] for name in ours} == ours
    unknown = {name for name in named if name.startswith("ONSTREAM_")} - {
        variable_of(name) for name in known()
    }
    assert not unknown


def test_the_settings_of_the_manifests_load_with_their_environment() -> None:
    (kustomization,) = all_objects("Kustomization")
    literals = dict(one.split("=", 1) for one in kustomization["configMapGenerator"][1]["literals"])
    literals.pop("ONSTREAM_REDIS__PASSWORD_FILE")
    settings = load_settings([ROOT / "deploy/k8s/onstream.toml"], environ=literals)
    assert settings.weights.transport == "redis"
    assert (ROOT / "deploy/k8s/onstream.toml").read_text() == (
        ROOT / "examples/reverse-text/onstream.toml"
    ).read_text()


def test_keda_scales_each_stage_by_the_length_of_the_stream_it_takes_from() -> None:
    deployments = {each["metadata"]["name"] for each in all_objects("Deployment")}
    settings = load_settings([ROOT / "deploy/k8s/onstream.toml"], environ={})
    for scaled in all_objects("ScaledObject"):
        kind = scaled["spec"]["scaleTargetRef"]["name"]
        (trigger,) = scaled["spec"]["triggers"]
        assert kind in deployments
        assert trigger["metadata"]["stream"] == Keys(settings.run.name).streams[STAGE_OF[kind]]
        assert trigger["metadata"]["consumerGroup"] == GROUP
        assert scaled["spec"]["minReplicaCount"] == 1
    assert {each["metadata"]["name"] for each in all_objects("ScaledObject")} == {
        "generator",
        "verifier",
        "teacher",
    }


def test_every_image_of_the_manifests_runs_kinds_that_it_can() -> None:
    for each in (*all_objects("Deployment"), *all_objects("StatefulSet")):
        (container,) = each["spec"]["template"]["spec"]["containers"]
        if container["image"] == "onstream-slim":
            assert each["metadata"]["name"] in ("verifier", "teacher-external")


def test_the_dockerfile_names_a_target_for_every_image_and_none_of_them_runs_as_root() -> None:
    text = (ROOT / "Dockerfile").read_text()
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    final = {stage.split(" AS ")[1].split()[0]: stage for stage in stages}
    assert {"slim", "cpu", "cuda"} <= set(final)
    for target in ("slim", "cpu", "cuda"):
        assert re.findall(r"^USER (.*)$", final[target], re.MULTILINE)[-1] == "1000:1000"
    assert "torch" not in re.sub(r"#.*", "", final["base"] + final["slim"])


def test_docker_builds_see_nothing_but_what_the_dockerfile_copies() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    copied = {
        word
        for line in re.findall(
            r"^COPY (?!--from)(.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE
        )
        for word in line.split()
    }
    assert copied == {line[1:] for line in lines if line.startswith("!")}
