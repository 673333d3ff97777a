"""A scrape as Prometheus does it, read by its own parser."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def page(port: int) -> str:
    """What a scrape of this machine is answered."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        return str(reply.read().decode())


def scrape(port: int) -> dict[str, float]:
    """Every sample: its value by its name, with the values of its labels in brackets."""
    samples = {}
    for family in text_string_to_metric_families(page(port)):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = ",".join(sample.labels.values())
            samples[f"{sample.name}[{labels}]" if labels else sample.name] = sample.value
    return samples
