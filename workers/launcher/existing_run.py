"""What there is of a run before `onstream up` starts it: its plan, and whether it may go on."""

from __future__ import annotations

from collections.abc import Callable

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.redis.bus import Bus
from onstream.settings.plan import Plan, refuse_differences, under_name
from onstream.settings.root import Settings
from onstream.settings.stages import SWITCHES
from onstream.workers.inspection.audit import audit


def existing_plan(settings: Settings, bus: Bus) -> Plan | None:
    """The plan that the run was started with; from the run directory if another Redis held it."""
    if (data := bus.state.plan()) is not None:
        return Plan.decode(data)
    written = _written_plan(settings)
    return written and under_name(written, settings.run.name)


def check_resume(settings: Settings, plan: Plan, existing: Plan | None, bus: Bus) -> None:
    """Refuse `plan` where the run exists and must not, or was started with an `existing` other one.

    Raises:
        UserError: it says what differs.
    """

    def in_flight() -> int:
        return len(audit(settings.run_dir, bus)["in_flight"])

    check_plans(settings, plan, existing, in_flight)


def renamed(settings: Settings) -> str | None:
    """What there is to say of a run whose directory was copied or renamed; None of another one."""
    written = _written_plan(settings)
    if written is None or written.run == settings.run.name:
        return None
    return (
        f"{settings.run_dir} was the directory of run {written.run}, and was copied or renamed: it "
        f"goes on as run {settings.run.name}, from its newest checkpoint"
    )


def _written_plan(settings: Settings) -> Plan | None:
    path = settings.run_dir / "plan.json"
    return Plan.decode(path.read_bytes()) if path.exists() else None


def check_plans(
    settings: Settings, ours: Plan, theirs: Plan | None, in_flight: Callable[[], int]
) -> None:
    """Check `run.resume` against the plan of the run that exists, or None where none does.

    `in_flight` counts the rollouts on their way; they keep the route that they were issued with.

    Raises:
        UserError: the run exists and shall not, or the reverse, or it exists with other settings.
    """
    run_dir = settings.run_dir
    if theirs is None and settings.run.resume == "must":
        raise UserError(
            f'run.resume = "must", but there is no run {run_dir}',
            expected="a run to resume",
            next_step='Check run.name and run.dir, or set run.resume = "auto".',
            exit=Exit.REFUSED,
        )
    if theirs is not None and settings.run.resume == "never":
        raise UserError(
            f'run.resume = "never", but the run {run_dir} exists',
            expected="a new run",
            next_step=f"Choose another run.name, or remove {run_dir}.",
            exit=Exit.REFUSED,
        )
    if theirs is not None:
        _refuse_other_route(ours, theirs, in_flight)
        refuse_differences(ours, theirs)


def _refuse_other_route(ours: Plan, theirs: Plan, in_flight: Callable[[], int]) -> None:
    if ours.route == theirs.route:
        return
    our_route = " → ".join(ours.streams)
    their_route = " → ".join(theirs.streams)
    raise UserError(
        f"the settings route rollouts by {our_route}, but run {theirs.run!r} by {their_route}, "
        f"with {in_flight()} rollouts in flight on that route",
        expected="the route that the run was started with",
        next_step=f"{_route_hint(ours, theirs)}, or choose another run.name for a new run.",
        exit=Exit.REFUSED,
    )


def _route_hint(ours: Plan, theirs: Plan) -> str:
    """What to set, where leaving a stage out of `deployment.stages` has turned it off."""
    changed = set(ours.route) ^ set(theirs.route)
    switches = [f"{name} as it was" for stage, name in SWITCHES.items() if stage in changed]
    return f"Set {' and '.join(switches)}"
