"""The memory that one side of `tests.benchmarks.sample` takes, in a process of its own."""

from __future__ import annotations

import json
import resource
import sys

import torch

from tests.benchmarks.sample import CPU_WORKS, GPU_WORKS, Ours, Theirs


def main() -> None:
    """Print megabytes at the peak, less those that were held before loading."""
    asked = json.loads(sys.argv[1])
    work = next(each for each in (*CPU_WORKS, *GPU_WORKS) if each.name == asked["work"])
    torch.set_num_threads(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    side = (Ours if asked["side"] == "ours" else Theirs)(asked["folder"], work, "cuda" if asked["cuda"] else "cpu")
    side.draw()
    if asked["cuda"]:
        print(torch.cuda.max_memory_allocated() / 2**20)
        return
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)


if __name__ == "__main__":
    main()
