"""The law of scale: what the driver holds while copies are found does not grow with the rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = """
import hashlib, json, sys
from collections.abc import Sequence
import numpy as np, pyarrow as pa, ray
from pipeline.ingest.duplicates import FINGERPRINTS, DuplicateConfig
from pipeline.ingest.exchange import Exchange
from pipeline.ingest.fates import find_duplicates
from pipeline.run import shuffle

ROWS = 20_000

class Tables(Sequence):
    '''Fingerprints of which every fourth picture of every other table is a copy of one in the table before.'''
    def __init__(self, count):
        self.count = count
    def __len__(self):
        return self.count
    def __getitem__(self, number):
        if number >= self.count:
            raise IndexError(number)
        rows = range(number * ROWS, (number + 1) * ROWS)
        same = [row - ROWS if row % 4 == 0 and number % 2 else row for row in rows]
        digests = [hashlib.sha256(str(row).encode()).hexdigest() for row in same]
        keys = [hashlib.sha256(f"key {row}".encode()).hexdigest()[:24] for row in rows]
        places = [f"train/{number:06d}"] * ROWS
        return pa.table([[0] * ROWS, keys, places, digests, digests, [None] * ROWS], FINGERPRINTS)

count, folder = int(sys.argv[1]), sys.argv[2]
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
files = find_duplicates(Tables(count), count * ROWS, DuplicateConfig(), Exchange(folder, shuffle, 50_000))
# Not getrusage: its figure is also that of the process that this one was forked from.
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
print(json.dumps({"fallen": files.num_rows, "peak_mib": peak}))
"""


def found(count: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, str(count), str(folder)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout
    figures: dict[str, float] = json.loads(out.strip().splitlines()[-1])
    return figures


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_driver_holds_no_more_for_ten_times_the_rows(tmp_path: Path) -> None:
    """80,000 rows, then 800,000, whose fingerprints alone are 200 MB."""
    few, many = found(4, tmp_path / "few"), found(40, tmp_path / "many")
    print(few, many)
    assert (few["fallen"], many["fallen"]) == (10_000, 100_000)
    assert many["peak_mib"] < few["peak_mib"] + 100
