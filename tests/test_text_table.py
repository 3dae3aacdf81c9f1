"""Laws of a shard's text table: the file is safetensors' own, byte for byte, however its embeddings come."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from ldm.conditioning.text_embedding import TextEmbedding
from ldm.storage import read_bytes
from pipeline.store.manifest import FileRecord
from pipeline.text_table import distinct_captions, open_text_table, write_table

ROWS = [("ein Käse 😀", "a"), ("",), ("b", "", "a"), ("zz",)]


def embedding_of(number: int, length: int, pooled_width: int | None) -> TextEmbedding:
    rng = np.random.default_rng(number)
    pooled = None if pooled_width is None else rng.normal(size=pooled_width).astype(np.float16)
    return TextEmbedding(states=rng.normal(size=(length, 6)).astype(np.float16), pooled=pooled)


@pytest.fixture(params=["local", "s3"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3_root"))
    return f"{root}/x.text.safetensors"


@pytest.mark.parametrize("pooled_width", [None, 3])
@pytest.mark.parametrize("part_size", [1, 2, 100])
def test_table_written_in_parts_of_any_order_is_what_safetensors_writes(
    path: str, pooled_width: int | None, part_size: int
) -> None:
    distinct = distinct_captions(ROWS)
    lengths = [3, 5, 1, 2, 4][: len(distinct)]
    embeddings = [embedding_of(number, length, pooled_width) for number, length in enumerate(lengths)]
    choices = [[distinct.index(caption) for caption in row] for row in ROWS]
    order = np.random.default_rng(part_size).permutation(len(distinct)).tolist()
    chunks = [order[start : start + part_size] for start in range(0, len(order), part_size)]
    parts = [(numbers, [embeddings[number] for number in numbers]) for numbers in chunks]
    record = write_table(path, distinct, choices, lengths, parts)

    letters = [caption.encode() for caption in distinct]
    expected = {
        "tokens": np.concatenate([embedding.states for embedding in embeddings]),
        "offsets": np.cumsum([0, *lengths]),
        "letters": np.frombuffer(b"".join(letters), np.uint8),
        "letter_offsets": np.cumsum([0, *map(len, letters)]),
        "choices": np.array([number for row in choices for number in row], np.int32),
        "choice_offsets": np.cumsum([0, *map(len, choices)]),
    }
    if pooled_width is not None:
        expected["pooled"] = np.stack([embedding.pooled for embedding in embeddings])
    content = read_bytes(path)
    assert content == safetensors.numpy.save(expected)
    assert record == FileRecord(len(content), hashlib.sha256(content).hexdigest())


def test_table_of_many_embeddings_is_written_with_few_in_memory(tmp_path: Path) -> None:
    num_captions, length = 400, 64
    distinct = ["", *(f"caption {number:04d}" for number in range(1, num_captions))]

    def parts() -> Iterator[tuple[list[int], list[TextEmbedding]]]:
        for number in range(num_captions):
            states = np.full((length, 768), number, np.float16)
            yield [number], [TextEmbedding(states=states)]

    tracemalloc.start()
    path = tmp_path / "x.text.safetensors"
    write_table(str(path), distinct, [[number] for number in range(num_captions)], [length] * num_captions, parts())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = num_captions * length * 768 * 2
    assert peak < whole / 8
    table = open_text_table(path)
    assert [int(table.states(number)[-1, -1]) for number in range(num_captions)] == list(range(num_captions))
