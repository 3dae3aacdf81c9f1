"""Laws of stage 1's memory forecast: it is what both engines hold, and every form of the loss can be forecast."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from jobs.wiring.autoencoder_memory import Reconstructing, advice, autoencoder_pass, needed
from ldm.autoencoder.codebook import CodebookConfig
from ldm.autoencoder.model import AutoencoderConfig
from ldm.training.engine import LocalEngine
from ldm.training.reconstruction_config import ReconstructionConfig
from tests.ranks import alone
from tests.tiny_stage1 import BATCH, EVERYTHING, KL, LOSS, SIDE, VQ, stage1_config, stage1_task, train_steps

LEARNED_CODES = replace(EVERYTHING, codebook=CodebookConfig())
FORMS = [(KL, LOSS), (VQ, LEARNED_CODES), (KL, replace(LOSS, adversarial_weight=0.0))]


def reconstructing(network: AutoencoderConfig, loss: ReconstructionConfig) -> Reconstructing:
    return Reconstructing(
        autoencoder=network,
        loss=loss,
        side=SIDE,
        has_averages=True,
        is_bf16=False,
        num_ranks=1,
        num_rows=BATCH,
    )


def num_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def held(network: nn.Module) -> int:
    return num_bytes([*network.parameters(), *network.buffers()])


@pytest.mark.parametrize("network, loss", FORMS)
def test_both_engines_hold_what_is_forecast(tmp_path: Path, network, loss) -> None:
    state = torch.get_rng_state()
    found = needed(reconstructing(network, loss))
    assert torch.equal(torch.get_rng_state(), state)
    task = stage1_task(stage1_config(tmp_path, network, loss), alone())
    train_steps(task, alone(), range(2))
    engines = [task.autoencoder, task.adversary.engine]
    assert isinstance(task.perceptual, nn.Module)
    moments = []
    for engine in engines:
        assert isinstance(engine, LocalEngine)
        states = engine._optimizer.state.values()
        moments += [value for state in states for value in state.values() if value.dim()]
    assert found.weights == sum(held(module) for module in (*(engine.raw for engine in engines), task.perceptual))
    assert found.optimizer == num_bytes(moments)
    assert found.averages == sum(num_bytes(engine.weights().values()) for engine in engines)
    assert found.buffers == found.host == 0
    assert found.activations > 0


def test_rows_that_the_perceptual_distance_looks_at_and_twice_the_rows_are_counted() -> None:
    whole = reconstructing(KL, LOSS)
    few = replace(whole, loss=replace(LOSS, perceptual_rows=1))
    assert autoencoder_pass(few).saved_bytes < autoencoder_pass(whole).saved_bytes
    twice = replace(whole, num_rows=2 * BATCH)
    assert autoencoder_pass(twice).saved_bytes == pytest.approx(2 * autoencoder_pass(whole).saved_bytes, rel=0.1)


def test_advice_leaves_out_what_is_done_already() -> None:
    whole = reconstructing(KL, LOSS)
    assert [way.split(",")[0] for way in advice(whole)] == [
        "--engine.precision bf16",
        "more workers",
        "fewer --loss.perceptual-rows",
        "devices with more memory",
    ]
    least = replace(whole, is_bf16=True, num_rows=1, loss=replace(LOSS, perceptual_weight=0.0))
    assert advice(least) == ("devices with more memory, or a smaller network",)
