"""mosaicml-streaming's side of the loader benchmark, in a process and an environment of its own.

python -m tests.benchmarks.streaming_child ROWS_FOLDER BATCH_SIZE MAX_TOKENS; then one JSON command a line:
["samples", number of batches] or ["digests", number of batches], answered by one line of JSON. The rows of the folder
(moments.npy, states.npy, lengths.npy, names.json) are first written as MDS shards beside them.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from streaming import MDSWriter, StreamingDataset

from tests.benchmarks.collation import Batch, batched_rows, digests, samples_a_second


def written(folder: Path) -> Path:
    """Write the rows as MDS and return the folder of the shards."""
    moments, states = (np.load(folder / name, mmap_mode="r") for name in ("moments.npy", "states.npy"))
    lengths, names = np.load(folder / "lengths.npy"), json.loads((folder / "names.json").read_text())
    target = folder / "mds"
    shape = ",".join(str(side) for side in moments.shape[1:])
    columns = {"key": "str", "caption": "str", "moments": f"ndarray:float16:{shape}", "states": "ndarray:float16"}
    with MDSWriter(out=str(target), columns=columns) as writer:
        for row, (key, caption) in enumerate(names):
            state = np.array(states[row, : lengths[row]])
            writer.write({"key": key, "caption": caption, "moments": np.array(moments[row]), "states": state})
    return target


def batches(dataset: StreamingDataset, batch_size: int, max_tokens: int) -> Iterator[Batch]:
    """Yield shuffled batches, epoch after epoch."""
    while True:
        rows = ((sample["key"], sample["moments"], sample["states"]) for sample in dataset)
        yield from batched_rows(rows, batch_size, max_tokens)


def main() -> None:
    """Write the shards, then answer commands until there are none."""
    torch.set_num_threads(1)
    folder, batch_size, max_tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    target = written(folder)
    num_bytes = sum(path.stat().st_size for path in target.iterdir())
    versions = {name: importlib.metadata.version(name) for name in ("mosaicml-streaming", "torch", "numpy")}
    print(json.dumps({"bytes": num_bytes, "versions": versions}), flush=True)
    dataset = StreamingDataset(local=str(target), shuffle=True, batch_size=batch_size)
    for line in sys.stdin:
        command, num_batches = json.loads(line)
        made = batches(dataset, batch_size, max_tokens)  # begins a new epoch
        answer = samples_a_second(made, num_batches) if command == "samples" else digests(made, num_batches)
        made.close()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
