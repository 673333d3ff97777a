"""Runs of both sides, each in processes of its own, one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.kept_results import Identity, KeptResults, Result
from benchmarks.peers import onstream_side
from benchmarks.peers.measured import EVALUATE_EVERY, Step, exact, rates, way_to_goal
from benchmarks.peers.pairs import ModelPair, pair_of, train_prompts
from benchmarks.peers.sizes import BFLOAT16, EXAMPLE_OFF_POLICY_STEPS, SYNCHRONOUS, Size, TrlForm
from benchmarks.peers.usage import Usage, UsageWatch
from onstream.settings.load import load_settings
from onstream.settings.root import Settings

TRL_SIDE = Path(__file__).with_name("trl_side.py")
WORK = ("batch", "group", "prompt_tokens", "max_completion", "untimed")
"""What of a size a result depends on."""
FEW_POLICIES = 4
MAX_PROMPT_TOKENS = 512  # what the shipped pair reads
OUTPUT_LINES = 40
ONSTREAM_SIDES = {"onstream": (), "synchronous": SYNCHRONOUS, "bfloat16": BFLOAT16}
"""Onstream's own runs by name, and what they override of the example's settings."""


Tell = Callable[[str, float, Result], None]
"""Is told what a run was, how many seconds one like it was expected to take, and its result."""


@dataclass(frozen=True)
class Environment:
    """Where the runs take place."""

    trl_python: Path
    packages: Path
    """The site-packages of TRL's environment."""
    pairs: Path
    versions: Mapping[str, Mapping[str, str]]
    """By side: what a kept result depends on."""


class RunFailed(Exception):
    """A run ended with an error; its last lines."""


class Runner:
    """Measures runs that are not kept, and tells each as it is done."""

    def __init__(self, environment: Environment, kept: KeptResults, tell: Tell) -> None:
        self._kept = kept
        self._environment = environment
        self._tell = tell
        self._pairs: dict[str, ModelPair] = {}

    def trl(self, size: Size, form: TrlForm, steps: int, seed: int, round_: int) -> Result:
        """A run of TRL. The rates alone count of one that is shorter than the size's."""
        run = self._identity(size, "trl", steps, seed, round_) | {"form": asdict(form)}
        whole = steps == size.steps["trl"]
        evaluated = size.to_goal and whole
        return self._run(
            f"({size.name}) TRL, {form}, seed {seed}",
            size.seconds["trl" if whole else "sweep"],
            run,
            lambda directory: self._measure_trl(size, form, steps, seed, evaluated, directory),
        )

    def onstream(self, size: Size, side: str, seed: int, round_: int) -> Result:
        """A run of Onstream, under the name `side` of `ONSTREAM_SIDES`."""
        run = self._identity(size, side, size.steps[side], seed, round_)
        name = "Onstream" if side == "onstream" else f"Onstream, {side}"
        return self._run(
            f"({size.name}) {name}, seed {seed}",
            size.seconds[side],
            run,
            lambda directory: self._measure_onstream(size, side, seed, directory),
        )

    def _identity(
        self, size: Size, side: str, steps: int, seed: int, round_: int
    ) -> dict[str, Any]:
        """What tells a run from others, but TRL's form."""
        versions = self._environment.versions["trl" if side == "trl" else "onstream"]
        return {
            "size": size.name,
            **{name: getattr(size, name) for name in WORK},
            "side": side,
            "steps": steps,
            "seed": seed,
            "round": round_,
            "versions": dict(versions),
        }

    def _run(
        self, title: str, expected_s: float, run: Identity, measure: Callable[[Path], Result]
    ) -> Result:
        def in_a_directory() -> Result:
            began = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="onstream-peers-") as directory:
                result = measure(Path(directory))
            return result | {"wall_s": time.monotonic() - began}

        if self._kept.has(run):
            title += " (kept)"
        result = self._kept.get(run, in_a_directory)
        self._tell(title, expected_s, result)
        return result

    def _pair(self, size: Size) -> ModelPair:
        if size.name not in self._pairs:
            environment = self._environment
            self._pairs[size.name] = pair_of(size, environment.pairs, environment.packages)
        return self._pairs[size.name]

    def _settings(self, size: Size, steps: int, seed: int, more: Sequence[str] = ()) -> Settings:
        given = onstream_side.overrides(size, self._pair(size), steps, seed)
        return load_settings([onstream_side.SETTINGS], [*given, *more])

    def _measure_trl(
        self, size: Size, form: TrlForm, steps: int, seed: int, evaluated: bool, directory: Path
    ) -> Result:
        pair = self._pair(size)
        settings = self._settings(size, steps, seed)
        request = {
            "form": asdict(form),
            "steps": steps,
            "seed": seed,
            "batch": size.batch,
            "group": size.group,
            "max_completion": size.max_completion,
            "max_prompt": size.prompt_tokens or MAX_PROMPT_TOKENS,
            "student": str(pair.student),
            "teacher": str(pair.teacher),
            "prompts": train_prompts(settings, steps * size.prompts_a_step),
            "keep_every": EVALUATE_EVERY if evaluated else None,
            "directory": str(directory),
        }
        asked, answer = directory / "request.json", directory / "result.json"
        asked.write_text(json.dumps(request))
        words = [str(self._environment.trl_python), "-P", str(TRL_SIDE), str(asked), str(answer)]
        usage = watched(words, {"OMP_NUM_THREADS": str(form.threads), "HF_HUB_OFFLINE": "1"})
        rows: list[Step] = json.loads(answer.read_text())
        result = rates(rows, usage, min(size.untimed, steps - 1))
        if evaluated:
            result |= way_to_goal(rows, lambda step: exact(directory / f"{step:06d}", settings))
        return result

    def _measure_onstream(self, size: Size, side: str, seed: int, directory: Path) -> Result:
        steps = size.steps[side]
        more = ONSTREAM_SIDES[side]
        given = [*onstream_side.overrides(size, self._pair(size), steps, seed), *more]
        kept_policies = steps + 1 if size.to_goal else FEW_POLICIES
        words = onstream_side.command(given, directory, kept_policies)
        usage = watched(words, {"PYTHONPATH": os.getcwd()})
        rows = onstream_side.steps_of(directory)
        result = rates(
            rows, usage, size.untimed, 0 if more == SYNCHRONOUS else EXAMPLE_OFF_POLICY_STEPS
        )
        if size.to_goal:
            settings = self._settings(size, steps, seed)
            result |= way_to_goal(
                rows, lambda step: exact(onstream_side.policy(directory, step), settings)
            )
        return result


def watched(command: Sequence[str], variables: Mapping[str, str]) -> Usage:
    """Run `command` to its end; what it and all that it starts used.

    Raises:
        RunFailed: it failed.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=output, stderr=subprocess.STDOUT
        )
        watch = UsageWatch(process.pid)
        try:
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            usage = watch.stop()
        if process.returncode:
            output.seek(0)
            last = output.read().splitlines()[-OUTPUT_LINES:]
            raise RunFailed("\n".join([f"{' '.join(command)} failed:", *last]))
    return usage
