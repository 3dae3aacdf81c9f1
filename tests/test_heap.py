"""Large buffers of a worker: taken from the system once, by whichever thread, and no number depends on it."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, threading
from pipeline.heap import keep_large_blocks
if {is_kept}:
    keep_large_blocks()
import torch

def fill():
    for turn in range(8):  # blocks are aligned, so the heap first grows by a few
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.full((1 << 25,), 1.0)  # 128 MiB, freed at once
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=fill)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the settings are those of glibc")
def test_heap_large_buffer_of_a_thread_is_cleared_only_at_first() -> None:
    fresh, kept = (_faults(is_kept) for is_kept in (False, True))
    if fresh < 100:
        pytest.skip("this system's allocator keeps large blocks by itself, or maps them in huge pages")
    assert kept < fresh / 10


def _faults(is_kept: bool) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(is_kept=is_kept)], check=True, capture_output=True, text=True
    )
    return int(done.stdout)
