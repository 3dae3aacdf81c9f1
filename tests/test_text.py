"""Laws of text embeddings: padding is without effect where the mask allows it, and kept where it is attended."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from ldm.conditioning.text import (
    TextEncoder,
    TextEncoderConfig,
    TextEncoderKind,
    encoder_folder,
    text_encoder_digest,
)
from ldm.conditioning.text_embedding import TextEmbedding, condition_of, pad_states, stacked_pooled
from tests.tiny_text import write_clip

CPU = torch.device("cpu")
CAPTIONS = ["red heart", "", "a cat with tears of joy, drawn in openmoji style", "cat", "red heart", "dog face"]


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return TextEncoder(TextEncoderConfig(max_tokens=12), CPU)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def clip_config(folder: Path, max_tokens: int = 16) -> TextEncoderConfig:
    return TextEncoderConfig(kind=TextEncoderKind.CLIP, path=str(folder), max_tokens=max_tokens)


def test_text_unpadded_embedding_equals_the_encoders_own_padded_and_masked_output(minilm: TextEncoder) -> None:
    tower = minilm.towers[0]
    tokens = tower.tokens(CAPTIONS)
    padded = torch.zeros(len(tokens), 12, dtype=torch.int64)
    for row, numbers in zip(padded, tokens, strict=True):
        row[: len(numbers)] = torch.tensor(numbers)
    lengths = torch.tensor([len(numbers) for numbers in tokens])
    mask = torch.arange(12) < lengths[:, None]
    expected = tower.output(padded, mask).states
    alone = [tower.output(torch.tensor([numbers])).states[0] for numbers in tokens]
    assert len(set(lengths.tolist())) > 2
    for row, numbers in enumerate(alone):
        torch.testing.assert_close(numbers, expected[row, : len(numbers)], atol=1e-5, rtol=0)
    repadded = condition_of(minilm.encode(CAPTIONS), 12)
    assert torch.equal(repadded.mask, mask)
    torch.testing.assert_close(repadded.states[mask], expected[mask], atol=2e-3, rtol=1e-3)  # fp16's rounding
    assert not repadded.states[~mask].any()
    assert repadded.pooled is None


def test_text_rows_come_in_the_callers_order_and_bytes_repeat(minilm: TextEncoder) -> None:
    first, again = minilm.encode(CAPTIONS, batch_size=2), minilm.encode(CAPTIONS, batch_size=2)
    assert [row.states.tobytes() for row in first] == [row.states.tobytes() for row in again]
    assert all(row.states.dtype == np.float16 and row.states.shape[1] == minilm.width for row in first)
    for caption, row in zip(CAPTIONS, first, strict=True):
        np.testing.assert_allclose(row.states, minilm.encode([caption])[0].states, atol=2e-3)
    assert minilm.encode([]) == []


def test_text_long_captions_are_truncated_and_counted(minilm: TextEncoder) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve"
    exact = "one two three four five six seven eight nine ten"
    assert [len(row.states) for row in minilm.encode([long, exact])] == [12, 12]
    assert minilm.count_truncated([long, exact, ""]) == 1


def test_text_clip_stores_its_attended_padding(clip_folder: Path) -> None:
    encoder = TextEncoder(clip_config(clip_folder), CPU)
    oracle = CLIPTextModel.from_pretrained(clip_folder).eval()
    rows = [embedding.states for embedding in encoder.encode(["a cat", ""])]
    assert [row.shape for row in rows] == [(16, 32), (16, 32)]
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    numbers = tokenizer(["a cat", ""], padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = oracle(input_ids=numbers).last_hidden_state.half().numpy()
    np.testing.assert_allclose(np.stack(rows), expected, atol=2e-3)
    assert pad_states(rows, 16)[1].all()


def test_text_clip_beyond_its_positions_is_refused(clip_folder: Path) -> None:
    with pytest.raises(ValueError, match="max_tokens is 17.* 16 positions"):
        TextEncoder(clip_config(clip_folder, 17), CPU)


def test_text_digest_follows_every_file_and_no_path(clip_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(clip_folder, tmp_path / "copy"))
    original = text_encoder_digest(clip_config(clip_folder))
    assert text_encoder_digest(clip_config(copy)) == original
    weights = load_file(copy / "model.safetensors")
    first = sorted(weights)[0]
    save_file(weights | {first: weights[first] + 1}, copy / "model.safetensors", metadata={"format": "pt"})
    assert text_encoder_digest(clip_config(copy)) != original
    assert TextEncoder(clip_config(copy), CPU).digest == text_encoder_digest(clip_config(copy))


@pytest.mark.parametrize("kind", [TextEncoderKind.CLIP, TextEncoderKind.BERT])
def test_text_digest_of_the_first_kinds_is_the_one_that_caches_and_models_hold(
    clip_folder: Path, kind: TextEncoderKind
) -> None:
    expected = hashlib.sha256(f"attended pads {kind is TextEncoderKind.CLIP}".encode())
    for path in sorted(clip_folder.iterdir()):
        expected.update(f"\n{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    assert text_encoder_digest(TextEncoderConfig(kind=kind, path=str(clip_folder))) == expected.hexdigest()


def test_text_config_says_its_layer_only_where_it_is_not_the_families_own() -> None:
    plain = {"type": "TextEncoderConfig", "kind": "clip", "path": "x", "max_tokens": 77}
    config = TextEncoderConfig(kind=TextEncoderKind.CLIP, path="x")
    assert config.to_dict() == plain
    earlier = TextEncoderConfig(kind=TextEncoderKind.CLIP, path="x", layer=-2)
    assert earlier.to_dict() == plain | {"layer": -2}
    assert [TextEncoderConfig.from_yaml(each.to_yaml()) for each in (config, earlier)] == [config, earlier]


def test_text_folder_of_the_packaged_encoder_is_the_packaged_encoder(minilm: TextEncoder) -> None:
    folder = encoder_folder(TextEncoderConfig())
    named = TextEncoderConfig(kind=TextEncoderKind.BERT, path=str(folder), max_tokens=12)
    assert TextEncoder(named, CPU).digest == minilm.digest


def test_text_incomplete_weights_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(clip_folder, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack .*layers\.1\.mlp"):
        TextEncoder(clip_config(copy), CPU)


def test_text_loading_writes_nothing_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    TextEncoder(TextEncoderConfig(), CPU)
    written = capfd.readouterr()
    assert (written.out, written.err) == ("", "")


def test_text_encoder_is_frozen_and_in_evaluation(minilm: TextEncoder) -> None:
    first, again = (minilm.towers[0].output(torch.tensor([[101, 4937, 102]])).states for _ in range(2))
    assert torch.equal(first, again)
    assert not first.requires_grad


def test_text_rows_longer_than_the_padding_are_refused(minilm: TextEncoder) -> None:
    with pytest.raises(ValueError, match="has 4 tokens, max_tokens is 3"):
        condition_of(minilm.encode(["red heart"]), 3)


def test_text_pooled_outputs_are_stacked_in_order_and_needed_in_all_rows_or_none() -> None:
    plain = TextEmbedding(states=np.zeros((1, 2), np.float16))
    rows = [TextEmbedding(states=plain.states, pooled=np.full(3, number, np.float16)) for number in range(2)]
    assert stacked_pooled([plain, plain]) is None
    assert stacked_pooled(rows).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert condition_of(rows, 1).pooled.dtype == torch.float32
    with pytest.raises(ValueError, match="2 of 3 embeddings have a pooled output"):
        condition_of([*rows, plain], 1)


def test_text_missing_folder_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="/no/such/encoder does not exist"):
        text_encoder_digest(clip_config(Path("/no/such/encoder")))
