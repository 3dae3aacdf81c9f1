"""Laws of the families of text encoders: each gives what its own transformer gives, stored whole and nothing more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from ldm.conditioning.text import TextEncoder, TextEncoderKind, text_encoder_digest
from ldm.conditioning.text_embedding import TextEmbedding, condition_of
from tests.tiny_text import (
    BIG_WIDTH,
    CAPTIONS,
    CLIP_WIDTH,
    MAX_TOKENS,
    PROJECTED_WIDTH,
    Touch,
    clip_text_config,
    encoder_config,
    t5_config,
    write_clip,
    write_clip_projection,
    write_clip_tokenizer,
    write_sdxl,
    write_t5,
)

CPU = torch.device("cpu")
WRITERS: dict[TextEncoderKind, Callable[[Path], Path]] = {
    TextEncoderKind.CLIP: write_clip,
    TextEncoderKind.CLIP_PROJECTION: write_clip_projection,
    TextEncoderKind.SDXL: write_sdxl,
    TextEncoderKind.T5: write_t5,
}
HALF = {"atol": 2e-3, "rtol": 1e-3}  # fp16's rounding


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[TextEncoderKind, Path]:
    return {kind: write(tmp_path_factory.mktemp(kind.value)) for kind, write in WRITERS.items()}


def encoder_of(folders: dict[TextEncoderKind, Path], kind: TextEncoderKind, **fields: object) -> TextEncoder:
    return TextEncoder(encoder_config(kind, folders[kind], **fields), CPU)


def padded_numbers(folder: Path, captions: list[str] = CAPTIONS) -> torch.Tensor:
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    options = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
    numbers: torch.Tensor = tokenizer(captions, **options).input_ids
    return numbers


def states_of(embeddings: list[TextEmbedding]) -> torch.Tensor:
    return torch.from_numpy(np.stack([embedding.states for embedding in embeddings])).float()


def pooled_of(embeddings: list[TextEmbedding]) -> torch.Tensor:
    return torch.from_numpy(np.stack([embedding.pooled for embedding in embeddings])).float()


def test_text_t5_repadded_embedding_equals_its_own_padded_and_masked_output(folders) -> None:
    encoder = encoder_of(folders, TextEncoderKind.T5)
    oracle = T5EncoderModel.from_pretrained(folders[TextEncoderKind.T5]).eval()
    tokens = encoder.towers[0].tokens(CAPTIONS)
    lengths = torch.tensor([len(row) for row in tokens])
    mask = torch.arange(MAX_TOKENS) < lengths[:, None]
    padded = torch.zeros(len(tokens), MAX_TOKENS, dtype=torch.int64)
    padded[mask] = torch.tensor([number for row in tokens for number in row])
    with torch.no_grad():
        expected = oracle(input_ids=padded, attention_mask=mask).last_hidden_state
    assert len(set(lengths.tolist())) > 2
    for row, numbers in enumerate(tokens):
        alone = encoder.towers[0].output(torch.tensor([numbers])).states[0]
        torch.testing.assert_close(alone, expected[row, : len(numbers)], atol=1e-5, rtol=0)
    given = condition_of(encoder.encode(CAPTIONS), MAX_TOKENS)
    assert torch.equal(given.mask, mask)
    torch.testing.assert_close(given.states[mask], expected[mask], **HALF)
    assert not given.states[~mask].any()
    assert given.pooled is None
    with torch.no_grad():  # the law would be empty if positions did not count
        oracle.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
        assert (oracle(input_ids=padded, attention_mask=mask).last_hidden_state - expected).abs().max() > 0.01


def test_text_t5_has_positions_for_any_length_and_its_null_caption_is_one_token(folders) -> None:
    encoder = encoder_of(folders, TextEncoderKind.T5, max_tokens=600)
    assert encoder.towers[0].tokens([""]) == [[1]]
    lengths = [len(embedding.states) for embedding in encoder.encode(["", "a " * 400])]
    assert lengths == [1, 600]
    assert encoder.count_truncated(["", "a " * 400]) == 1


def test_text_t5_of_a_whole_t5_is_its_encoder(folders, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders[TextEncoderKind.T5], tmp_path / "copy"))
    whole = T5ForConditionalGeneration(t5_config())
    own = T5EncoderModel.from_pretrained(copy)
    whole.load_state_dict(own.state_dict(), strict=False)
    whole.save_pretrained(copy)
    assert any(name.startswith("decoder.block") for name in load_file(copy / "model.safetensors"))
    ours = TextEncoder(encoder_config(TextEncoderKind.T5, copy), CPU).encode(CAPTIONS)
    theirs = encoder_of(folders, TextEncoderKind.T5).encode(CAPTIONS)
    assert [row.states.tobytes() for row in ours] == [row.states.tobytes() for row in theirs]


def test_text_clip_pools_the_end_token(folders) -> None:
    encoder = encoder_of(folders, TextEncoderKind.CLIP)
    oracle = CLIPTextModel.from_pretrained(folders[TextEncoderKind.CLIP]).eval()
    numbers = padded_numbers(folders[TextEncoderKind.CLIP])
    with torch.no_grad():
        expected = oracle(input_ids=numbers)
    embeddings = encoder.encode(CAPTIONS)
    torch.testing.assert_close(pooled_of(embeddings), expected.pooler_output, **HALF)
    first_end = (numbers == numbers.max()).int().argmax(dim=1)
    assert torch.equal(pooled_of(embeddings), states_of(embeddings)[torch.arange(len(numbers)), first_end])
    assert encoder.pooled_width == CLIP_WIDTH


def test_text_clip_projection_pools_the_text_embedding(folders) -> None:
    folder = folders[TextEncoderKind.CLIP_PROJECTION]
    encoder = encoder_of(folders, TextEncoderKind.CLIP_PROJECTION)
    oracle = CLIPTextModelWithProjection.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = oracle(input_ids=padded_numbers(folder))
    torch.testing.assert_close(states_of(encoder.encode(CAPTIONS)), expected.last_hidden_state, **HALF)
    torch.testing.assert_close(pooled_of(encoder.encode(CAPTIONS)), expected.text_embeds, **HALF)
    assert (encoder.width, encoder.pooled_width) == (CLIP_WIDTH, PROJECTED_WIDTH)


def test_text_towers_of_a_whole_clip_are_its_text_tower(tmp_path: Path) -> None:
    write_clip_tokenizer(tmp_path)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    settings = {"text_config": clip_text_config().to_dict(), "vision_config": vision.to_dict()}
    whole = CLIPModel(CLIPConfig(**settings, projection_dim=PROJECTED_WIDTH)).eval()
    whole.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = whole.get_text_features(padded_numbers(tmp_path)).pooler_output
    projected = TextEncoder(encoder_config(TextEncoderKind.CLIP_PROJECTION, tmp_path), CPU).encode(CAPTIONS)
    plain = TextEncoder(encoder_config(TextEncoderKind.CLIP, tmp_path), CPU).encode(CAPTIONS)
    torch.testing.assert_close(pooled_of(projected), expected, **HALF)
    assert torch.equal(states_of(projected), states_of(plain))


@pytest.mark.parametrize("kind", [TextEncoderKind.CLIP, TextEncoderKind.CLIP_PROJECTION, TextEncoderKind.T5])
def test_text_layer_is_the_hidden_state_of_that_number(folders, kind: TextEncoderKind) -> None:
    last = encoder_of(folders, kind)
    named = encoder_of(folders, kind, layer=-1)
    earlier = encoder_of(folders, kind, layer=-2)
    tokens = torch.tensor(last.towers[0].tokens(["red heart"]))
    oracle = last.towers[0]._model
    with torch.no_grad():
        hidden = oracle(input_ids=tokens, output_hidden_states=True).hidden_states
    assert torch.equal(named.towers[0].output(tokens).states, last.towers[0].output(tokens).states)
    for layer in (-3, -2, 0, 1):
        output = encoder_of(folders, kind, layer=layer).towers[0].output(tokens)
        assert torch.equal(output.states, hidden[layer])
        if output.pooled is not None:
            assert torch.equal(output.pooled, last.towers[0].output(tokens).pooled)
    assert last.digest == named.digest != earlier.digest
    with pytest.raises(ValueError, match="layer is -4, .* has the layers -3 to 2"):
        encoder_of(folders, kind, layer=-4)


def test_text_sdxl_is_both_towers_last_but_one_layers_side_by_side(folders) -> None:
    folder = folders[TextEncoderKind.SDXL]
    encoder = encoder_of(folders, TextEncoderKind.SDXL)
    small = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    big = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").eval()
    numbers = [padded_numbers(folder / name) for name in ("tokenizer", "tokenizer_2")]
    assert (numbers[0] != numbers[1]).any()  # they pad with tokens of their own
    with torch.no_grad():
        outputs = [
            tower(input_ids=rows, output_hidden_states=True) for tower, rows in zip((small, big), numbers, strict=True)
        ]
    embeddings = encoder.encode(CAPTIONS)
    expected = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    torch.testing.assert_close(states_of(embeddings), expected, **HALF)
    torch.testing.assert_close(pooled_of(embeddings), outputs[1].text_embeds, **HALF)
    assert (encoder.width, encoder.pooled_width) == (CLIP_WIDTH + BIG_WIDTH, PROJECTED_WIDTH)
    again = encoder.encode(CAPTIONS)
    assert [(row.states.tobytes(), row.pooled.tobytes()) for row in embeddings] == [
        (row.states.tobytes(), row.pooled.tobytes()) for row in again
    ]


def test_text_sdxl_is_what_diffusers_gives_its_unet(folders) -> None:
    folder = folders[TextEncoderKind.SDXL]
    oracle = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder").eval(),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").eval(),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=None,
        scheduler=None,
    )
    with torch.no_grad():
        states, _, pooled, _ = oracle.encode_prompt(CAPTIONS, device=CPU, do_classifier_free_guidance=False)
    given = condition_of(encoder_of(folders, TextEncoderKind.SDXL).encode(CAPTIONS), MAX_TOKENS)
    torch.testing.assert_close(given.states, states, **HALF)
    torch.testing.assert_close(given.pooled, pooled, **HALF)
    assert given.mask.all()


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_text_sdxl_digest_follows_every_part_and_the_layer_but_no_path(folders, tmp_path: Path, part: str) -> None:
    copy = Path(shutil.copytree(folders[TextEncoderKind.SDXL], tmp_path / "copy"))
    original = text_encoder_digest(encoder_config(TextEncoderKind.SDXL, folders[TextEncoderKind.SDXL]))
    assert text_encoder_digest(encoder_config(TextEncoderKind.SDXL, copy)) == original
    assert text_encoder_digest(encoder_config(TextEncoderKind.SDXL, copy, layer=-2)) == original
    assert text_encoder_digest(encoder_config(TextEncoderKind.SDXL, copy, layer=-1)) != original
    path = copy / part / "model.safetensors"
    if path.exists():
        weights = load_file(path)
        first = sorted(weights)[0]
        save_file(weights | {first: weights[first] + 1}, path, metadata={"format": "pt"})
    else:
        path = copy / part / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 15}))
    altered = text_encoder_digest(encoder_config(TextEncoderKind.SDXL, copy))
    assert altered != original
    assert TextEncoder(encoder_config(TextEncoderKind.SDXL, copy), CPU).digest == altered
    shutil.rmtree(copy / part)
    with pytest.raises(ValueError, match=f"has no subfolder {part}"):
        text_encoder_digest(encoder_config(TextEncoderKind.SDXL, copy))


def test_text_kinds_that_pool_otherwise_have_digests_of_their_own(folders) -> None:
    folder = folders[TextEncoderKind.CLIP_PROJECTION]
    kinds = (TextEncoderKind.CLIP, TextEncoderKind.CLIP_PROJECTION)
    assert len({text_encoder_digest(encoder_config(kind, folder)) for kind in kinds}) == 2


def test_text_sdxl_counts_a_caption_too_long_for_both_towers_once(folders) -> None:
    encoder = encoder_of(folders, TextEncoderKind.SDXL)
    fits, long = "a" * (MAX_TOKENS - 2), "a" * (MAX_TOKENS - 1)
    assert [tower.truncated([fits, long]) for tower in encoder.towers] == [[False, True], [False, True]]
    assert encoder.count_truncated([fits, long, ""]) == 1
    assert encoder.count_truncated([]) == 0
    assert encoder.encode([]) == []


@pytest.mark.parametrize("kind", [TextEncoderKind.T5, TextEncoderKind.CLIP])
def test_text_tokenizer_without_its_vocabulary_is_refused(folders, tmp_path: Path, kind: TextEncoderKind) -> None:
    copy = Path(shutil.copytree(folders[kind], tmp_path / "copy"))
    for name in ("tokenizer.json", "vocab.json"):
        (copy / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        TextEncoder(encoder_config(kind, copy), CPU)


def test_text_projection_without_its_weights_is_refused(folders) -> None:
    plain = encoder_config(TextEncoderKind.CLIP_PROJECTION, folders[TextEncoderKind.CLIP])
    with pytest.raises(ValueError, match=r"lack text_projection\.weight"):
        TextEncoder(plain, CPU)


@pytest.mark.parametrize("kind", [TextEncoderKind.CLIP_PROJECTION, TextEncoderKind.T5])
def test_text_pickled_weights_are_read_as_tensors_only(folders, tmp_path: Path, kind: TextEncoderKind) -> None:
    copy = Path(shutil.copytree(folders[kind], tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    torch.save(weights | {"evil": Touch(tmp_path / "ran")}, copy / "pytorch_model.bin")
    expected = encoder_of(folders, kind).encode(CAPTIONS)
    preferred = TextEncoder(encoder_config(kind, copy), CPU).encode(CAPTIONS)  # safetensors, though a pickle lies there
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="a pickle of more than tensors, which is not run"):
        TextEncoder(encoder_config(kind, copy), CPU)
    assert not (tmp_path / "ran").exists()
    torch.load(copy / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()  # so the pickle would have run
    torch.save(weights, copy / "pytorch_model.bin")
    pickled = TextEncoder(encoder_config(kind, copy), CPU).encode(CAPTIONS)
    for given in (preferred, pickled):
        assert [row.states.tobytes() for row in given] == [row.states.tobytes() for row in expected]


def test_text_python_that_lies_in_the_folder_is_not_run(folders, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders[TextEncoderKind.CLIP], tmp_path / "copy"))
    (copy / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    for name, extra in (("config.json", {"model_type": "own"}), ("tokenizer_config.json", {"tokenizer_class": "Own"})):
        facts = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(facts | extra | {"auto_map": auto_map}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        TextEncoder(encoder_config(TextEncoderKind.BERT, copy), CPU)
    assert not (tmp_path / "ran").exists()


def test_text_embedding_beyond_fp16_is_refused(folders, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders[TextEncoderKind.CLIP], tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("final_layer_norm.weight"))
    save_file(weights | {name: weights[name] * 1e5}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"a text embedding reaches \S+, float16 holds 65504"):
        TextEncoder(encoder_config(TextEncoderKind.CLIP, copy), CPU).encode(["red heart"])
