"""The UNet compiles as one graph, whatever its form, and computes the same."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.timeout(900)
def test_unet_compiles_without_a_break_of_the_graph_and_predicts_the_same():
    run = subprocess.run(
        [sys.executable, "-m", "tests.compiled_unet"], capture_output=True, text=True, timeout=800, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    differences = json.loads(run.stdout.splitlines()[-1])
    assert len(differences) == 3
    assert {name: found for name, found in differences.items() if not found < 1e-5} == {}
