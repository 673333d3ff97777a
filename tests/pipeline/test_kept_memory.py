"""A worker that computes keeps the memory that it frees."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PAGES_OF_A_STEP = 8 * 1024
STEPS = """
import resource
from onstream.pipeline.processes import keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [bytearray(b"1") * (4 << 20) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

{first}
faults_of_a_step()
print(faults_of_a_step())
"""


def faults_of_a_later_step(first: str) -> int:
    """Pages that a process got anew in its second step of eight blocks of 4 MiB."""
    code = STEPS.format(first=first)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_the_memory_of_a_step_is_kept_for_the_next_one() -> None:
    assert faults_of_a_later_step("keep_freed_memory()") < PAGES_OF_A_STEP / 10
    assert faults_of_a_later_step("") > PAGES_OF_A_STEP / 2
