"""What there is of a run before `onstream up` starts it: its plan, and whether it may go on."""

from __future__ import annotations

from onstream.pipeline.redis.bus import Bus
from onstream.settings.plan import Plan, under_name
from onstream.settings.root import Settings
from onstream.workers.inspection.audit import audit
from onstream.workers.launcher import preflight


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

    preflight.check_resume(settings, plan, existing, in_flight)


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
