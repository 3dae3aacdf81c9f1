"""The memory that one side of `tests.benchmarks.sample` takes, in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.benchmarks.sample import CPU_WORKS, GPU_WORKS, Ours, Theirs


def peak_kilobytes() -> int:
    """Return this program's peak; rusage's would be that of the one which started it, where that was larger."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found)


def main() -> None:
    """Print megabytes at the peak, less those that were held before loading."""
    asked = json.loads(sys.argv[1])
    work = next(each for each in (*CPU_WORKS, *GPU_WORKS) if each.name == asked["work"])
    torch.set_num_threads(2)
    before = peak_kilobytes()
    side = (Ours if asked["side"] == "ours" else Theirs)(asked["folder"], work, "cuda" if asked["cuda"] else "cpu")
    side.draw()
    if asked["cuda"]:
        print(torch.cuda.max_memory_allocated() / 2**20)
        return
    print((peak_kilobytes() - before) / 2**10)


if __name__ == "__main__":
    main()
