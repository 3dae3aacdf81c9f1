"""Laws of text embeddings: padding is without effect where the mask allows it, and kept where it is attended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.conditioning.text import (
    TextEncoder,
    TextEncoderConfig,
    TextEncoderKind,
    encoder_folder,
    pad_states,
    text_encoder_digest,
)

CPU = torch.device("cpu")
CAPTIONS = ["red heart", "", "a cat with tears of joy, drawn in openmoji style", "cat", "red heart", "dog face"]


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return TextEncoder(TextEncoderConfig(max_tokens=12), CPU)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP text tower of 16 positions whose tokens are letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")).save_pretrained(folder)
    last = len(tokens) - 1
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=last - 1,
        eos_token_id=last,
        pad_token_id=last,
    )
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(folder)
    return folder


def clip_config(folder: Path, max_tokens: int = 16) -> TextEncoderConfig:
    return TextEncoderConfig(kind=TextEncoderKind.CLIP, path=str(folder), max_tokens=max_tokens)


def test_text_unpadded_embedding_equals_the_encoders_own_padded_and_masked_output(minilm: TextEncoder) -> None:
    tokens = minilm.tokens(CAPTIONS)
    padded = torch.zeros(len(tokens), 12, dtype=torch.int64)
    for row, numbers in zip(padded, tokens, strict=True):
        row[: len(numbers)] = torch.tensor(numbers)
    lengths = torch.tensor([len(numbers) for numbers in tokens])
    mask = torch.arange(12) < lengths[:, None]
    expected = minilm.states(padded, mask)
    alone = [minilm.states(torch.tensor([numbers]))[0] for numbers in tokens]
    assert len(set(lengths.tolist())) > 2
    for row, numbers in enumerate(alone):
        torch.testing.assert_close(numbers, expected[row, : len(numbers)], atol=1e-5, rtol=0)
    states, repadded_mask = pad_states(minilm.encode(CAPTIONS), 12)
    assert torch.equal(repadded_mask, mask)
    torch.testing.assert_close(states[mask], expected[mask], atol=2e-3, rtol=1e-3)  # fp16's rounding
    assert not states[~mask].any()


def test_text_rows_come_in_the_callers_order_and_bytes_repeat(minilm: TextEncoder) -> None:
    first, again = minilm.encode(CAPTIONS, batch_size=2), minilm.encode(CAPTIONS, batch_size=2)
    assert [row.tobytes() for row in first] == [row.tobytes() for row in again]
    assert all(row.dtype == np.float16 and row.shape[1] == minilm.width for row in first)
    for caption, row in zip(CAPTIONS, first, strict=True):
        np.testing.assert_allclose(row, minilm.encode([caption])[0], atol=2e-3)
    assert minilm.encode([]) == []


def test_text_long_captions_are_truncated_and_counted(minilm: TextEncoder) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve"
    exact = "one two three four five six seven eight nine ten"
    assert [len(row) for row in minilm.encode([long, exact])] == [12, 12]
    assert minilm.count_truncated([long, exact, ""]) == 1


def test_text_clip_stores_its_attended_padding(clip_folder: Path) -> None:
    encoder = TextEncoder(clip_config(clip_folder), CPU)
    oracle = CLIPTextModel.from_pretrained(clip_folder).eval()
    rows = encoder.encode(["a cat", ""])
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
    assert torch.equal(*(minilm.states(torch.tensor([[101, 4937, 102]])) for _ in range(2)))
    assert not minilm.states(torch.tensor([[101, 4937, 102]])).requires_grad


def test_text_rows_longer_than_the_padding_are_refused(minilm: TextEncoder) -> None:
    with pytest.raises(ValueError, match="has 4 tokens, max_tokens is 3"):
        pad_states(minilm.encode(["red heart"]), 3)


def test_text_missing_folder_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="/no/such/encoder does not exist"):
        text_encoder_digest(clip_config(Path("/no/such/encoder")))
