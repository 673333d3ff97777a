"""`onstream metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onstream.workers.commands.options import with_run_settings

if TYPE_CHECKING:
    from onstream.settings.root import Settings


@click.command()
@with_run_settings
@click.option(
    "--port",
    type=click.IntRange(min=0, max=65535),
    default=9750,
    show_default=True,
    help="The port to serve at; 0 for any that is free.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="The address to serve at: 0.0.0.0 for all of this machine.",
)
def metrics(settings: Settings, port: int, host: str) -> None:
    """Serve the state of a run to Prometheus.

    Backlog, rates, staleness, what was dropped, workers, memory and evaluations, at /metrics. It
    reads the run, before its start and after its end too, until it is stopped.
    """
    from onstream.pipeline.processes import StopSignals
    from onstream.workers.monitoring.exporter import Exporter

    with StopSignals() as stop:
        exporter = Exporter(settings, host, port)
        click.echo(f"run {settings.run.name}: http://{host}:{exporter.port}/metrics")
        while not stop.wait(60):
            pass
        exporter.close()
