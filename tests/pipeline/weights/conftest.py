"""Each transport in turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from onstream.pipeline.redis.bus import Bus
from tests.pipeline.weights.policies import Transport


@pytest.fixture(params=["filesystem", "redis"])
def transport(request: pytest.FixtureRequest, tmp_path: Path, bus: Bus) -> Transport:
    """A transport of a run that has published nothing."""
    return Transport(request.param, tmp_path, bus)
