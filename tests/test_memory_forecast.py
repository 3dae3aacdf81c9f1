"""Laws of the memory forecast: traced bytes are those of a real pass, sums are what engines hold, and ranks agree."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from jobs.wiring.memory_forecast import Denoising, Told, advice, denoiser_pass, forecasts, needed
from jobs.wiring.outlook import describe
from jobs.wiring.train_ldm import check_inputs
from ldm.conditioning.conditioner import ConditioningConfig, TextUse
from ldm.conditioning.layout import LayoutForm
from ldm.conditioning.transformer import TokenTransformerConfig
from ldm.precision import Precision
from ldm.training.activations import Pass, traced
from ldm.training.ema import EmaConfig
from ldm.training.engine import EngineConfig, EngineKind, LocalEngine
from ldm.training.memory import Sharding, Step, forecast, read_sharding
from ldm.training.optim import OptimConfig
from ldm.unet.model import UNet, UNetConfig
from tests.measured_memory import SHIPPED, Case, forecast_and_measured, loss_of
from tests.ranks import alone
from tests.tiny_latents import write_latents
from tests.tiny_training import tiny_config

SMALL = UNetConfig(
    in_channels=4,
    out_channels=4,
    base_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_factors=(2,),
    num_heads=2,
    context_width=32,
)
CASE = Case(unet=SMALL, rows=4, side=16, micro_rows=4, steps=2)


def traced_unet(config: UNetConfig, case: Case) -> Pass:
    return traced(lambda: UNet(config), partial(loss_of, config, case), weights=torch.float32, autocast=None)


def test_a_pass_of_a_network_worked_out_by_hand_has_exactly_its_bytes() -> None:
    def loss(network: nn.Module) -> Tensor:
        output: Tensor = network(torch.empty(8, 16))
        return output.square().sum()

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 64, bias=False), nn.ReLU(), nn.Linear(64, 4, bias=False))

    found = traced(build, loss, weights=torch.float32, autocast=None)
    inputs, hidden, output = 8 * 16 * 4, 8 * 64 * 4, 8 * 4 * 4
    assert found.weight_numels == (16 * 64, 64 * 4)
    assert found.saved_bytes == inputs + hidden + output  # relu and the second layer keep the same result
    # The most is alive where relu's gradient becomes the first layer's: the input, relu's result, both gradients of it
    assert found.peak_bytes >= inputs + 3 * hidden
    assert found.peak_with_gradients_bytes >= inputs + hidden + 16 * 64 * 4 + 64 * 4 * 4


def test_a_traced_pass_keeps_what_the_real_one_keeps_to_the_byte_and_draws_no_number() -> None:
    state = torch.get_rng_state()
    found = traced_unet(SMALL, CASE)
    assert torch.equal(torch.get_rng_state(), state)
    network = UNet(SMALL)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*network.parameters(), *network.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(SMALL, CASE, network)
    real = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)
    assert loss.requires_grad
    assert found.saved_bytes == real
    assert found.num_weights == sum(weight.numel() for weight in network.parameters())


def test_twice_the_rows_keep_twice_the_activations_and_checkpointing_keeps_fewer() -> None:
    one, two = (traced_unet(SMALL, CASE._replace(micro_rows=rows)).saved_bytes for rows in (8, 16))
    assert two == pytest.approx(2 * one, rel=0.02)
    assert traced_unet(replace(SMALL, checkpoint_activations=True), CASE).saved_bytes < 0.5 * one


def test_the_local_engine_holds_what_is_forecast_between_two_steps() -> None:
    ema = EmaConfig(further_half_lives=(8,))
    engine = LocalEngine(UNet(SMALL), OptimConfig(), ema, EngineConfig(), alone())
    engine.update([partial(loss_of, SMALL, CASE, engine.raw)], 1e-4, (4, 4))
    passed = replace(traced_unet(SMALL, CASE), peak_bytes=0, peak_with_gradients_bytes=0)
    found = forecast(Sharding(name="local"), replace(step_of(passed, num_ranks=1), num_averages=2))
    weights = list(engine.raw.parameters())
    moments = [value for state in engine._optimizer.state.values() for value in state.values() if value.dim()]
    assert found.moment == "update"
    assert found.weights == num_bytes([*weights, *engine.raw.buffers()])
    assert found.gradients == num_bytes([weight.grad for weight in weights])
    assert found.optimizer == num_bytes(moments)
    assert found.averages == sum(num_bytes(engine.weights(half_life).values()) for half_life in ema.half_lives)
    assert found.buffers == found.host == 0


def num_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def step_of(passed: Pass, *, num_ranks: int = 8, num_micro_batches: int = 1, is_on_cpu: bool = True) -> Step:
    return Step(
        passed=passed,
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        weight_bytes=4,
        num_averages=1,
        is_on_cpu=is_on_cpu,
    )


BIG = Pass(
    weight_numels=(1 << 20,) * 800,
    frozen_bytes=0,
    saved_bytes=10**9,
    peak_bytes=10**9,
    peak_with_gradients_bytes=13 * 10**8,
)


@pytest.mark.parametrize("is_on_cpu", [True, False])
def test_each_stage_takes_less_of_the_optimizer_and_the_last_of_weights_too(is_on_cpu: bool) -> None:
    step = step_of(BIG, is_on_cpu=is_on_cpu)
    found = {stage: forecast(read_sharding(str(SHIPPED / f"zero{stage}.json")), step) for stage in (1, 2, 3)}
    plain = forecast(Sharding(name="local"), step)
    num = BIG.num_weights
    assert plain.optimizer == 8 * num
    assert {memory.optimizer for memory in found.values()} == {12 * num // 8}
    assert {memory.averages for memory in found.values()} == {plain.averages // 8}
    assert plain.device > found[1].device >= found[2].device


def test_offload_moves_the_optimizer_to_the_host() -> None:
    step = step_of(BIG, is_on_cpu=False)
    for stage in (2, 3):
        there, offloaded = (
            forecast(read_sharding(str(SHIPPED / f"zero{stage}{form}.json")), step) for form in ("", "-offload")
        )
        assert offloaded.device < there.device
        assert offloaded.host >= there.optimizer
        assert offloaded.optimizer == offloaded.averages == 0


def test_gradients_of_several_micro_batches_stay_whole_until_the_step_unless_they_are_sharded() -> None:
    for stage, is_whole in ((None, True), (1, True), (2, False)):
        sharding = Sharding(name="") if stage is None else read_sharding(str(SHIPPED / f"zero{stage}.json"))
        backward = forecast(sharding, step_of(replace(BIG, peak_bytes=10**11), num_micro_batches=2))
        assert backward.moment == "backward"
        assert (backward.gradients >= 4 * BIG.num_weights) == is_whole


# The benchmark's `--quick`, 14 M weights: beside fewer, what libraries keep for themselves is more than the tolerance.
QUICK = replace(SMALL, base_channels=64, channel_mult=(1, 2, 3), num_res_blocks=2, attention_factors=(4,), num_heads=4)
MEASURED = Case(unet=QUICK, rows=4, side=32, micro_rows=4, steps=3)


@pytest.mark.parametrize(
    "file", [pytest.param(None, marks=pytest.mark.slow), "zero2", pytest.param("zero3", marks=pytest.mark.slow)]
)
def test_two_ranks_take_what_is_forecast(file: str | None) -> None:
    said, taken = forecast_and_measured(MEASURED, file, 2)
    assert said == pytest.approx(taken, rel=0.1)


TOLD = Told(size=(16, 24), pixels=(128, 192), max_tokens=16, text_width=32, pooled_width=48)
CONDITIONINGS = {
    "text": ConditioningConfig(),
    "trained text": ConditioningConfig(
        text=TextUse.TRAINED, text_transformer=TokenTransformerConfig(vocab_size=64, max_tokens=16, depth=1)
    ),
    "class": ConditioningConfig(text=TextUse.NONE, num_classes=4),
    "layout": ConditioningConfig(text=TextUse.NONE, has_layout=True),
    "boxes": ConditioningConfig(text=TextUse.NONE, has_layout=True, layout_form=LayoutForm.BOXES),
    "map": ConditioningConfig(map_classes=5),
    "inpainting": ConditioningConfig(has_masked_image=True),
    "super-resolution": ConditioningConfig(has_low_res=True),
    "sizes": ConditioningConfig(has_sizes=True),
}


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_every_condition_can_be_forecast(name: str) -> None:
    config = CONDITIONINGS[name]
    unet = replace(
        SMALL,
        in_channels=4 + config.spatial_channels(4),
        pooled_width=TOLD.pooled_width if config.has_sizes else None,
    )
    for weights, autocast in ((torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)):
        found = denoiser_pass(unet, config, TOLD, 4, weights=weights, autocast=autocast)
        assert found.peak_bytes >= found.saved_bytes > 0
        with torch.device("meta"):
            assert found.num_weights >= sum(weight.numel() for weight in UNet(unet).parameters())


def denoising(**changes) -> Denoising:
    given = {
        "unet": SMALL,
        "conditioning": ConditioningConfig(),
        "told": TOLD,
        "engine": EngineConfig(),
        "num_averages": 1,
        "num_ranks": 4,
        "num_rows": 8,
        "is_on_cpu": False,
    }
    return Denoising(**{**given, **changes})


def test_advice_goes_from_sharding_over_offload_to_fewer_rows_and_checkpointing() -> None:
    training = denoising(engine=EngineConfig(precision=Precision.BF16))
    ways = advice(training)
    assert [way.split(":")[0].split(",")[0] for way in ways[-3:]] == [
        "--engine.micro-batch-size 4",
        "--unet.checkpoint-activations",
        "devices with more memory",
    ]
    fewer = replace(training, engine=replace(training.engine, micro_batch_size=4))
    assert needed(fewer).device < needed(training).device
    last = advice(denoising(num_rows=1, unet=replace(SMALL, checkpoint_activations=True)))[-1]
    assert last == "devices with more memory, or a smaller network"


def test_advice_names_only_files_that_need_less() -> None:
    big = replace(SMALL, base_channels=512, channel_mult=(1, 2, 4), num_res_blocks=3)
    training = denoising(unet=big, engine=EngineConfig(kind=EngineKind.DEEPSPEED))
    now = needed(training)
    files = [re.findall(r"zero-config (\S+): (\S+) GB", way) for way in advice(training)]
    named = [(file, float(size)) for found in files for file, size in found]
    assert [Path(file).stem for file, _ in named] == ["zero3", "zero2-offload", "zero3-offload"]
    assert all(size < now.device / 1e9 for _, size in named)


def test_the_dry_run_shows_every_engine_with_the_configured_one_marked(tmp_path: Path) -> None:
    write_latents(tmp_path)
    config = tiny_config(tmp_path)
    config = replace(config, engine=EngineConfig(kind=EngineKind.DEEPSPEED, zero_config="infra/deepspeed/zero2.json"))
    lines = describe(config, check_inputs(config)).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("memory"))
    names = [line.split()[0] if "->" not in line else line.split()[1] for line in lines[start + 2 : -1]]
    assert names == ["local", "zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"]
    assert [line.split()[1] for line in lines if " -> " in line] == ["zero2"]
    assert re.fullmatch(r"there +\d+\.\d\d GB a rank, free memory of this machine now", lines[-1])


def test_the_copy_of_a_background_save_is_counted_where_it_lies() -> None:
    plain = denoising(num_averages=2)
    numel = plain.step(plain.configured).passed.num_weights
    copied = numel * (4 + 8 + 2 * 4)  # weight, two moments, two averages
    copying = replace(plain, saves_in_background=True)
    assert needed(copying).host - needed(plain).host == copied
    assert needed(copying).device == needed(plain).device
    on_cpu = replace(plain, is_on_cpu=True)
    assert needed(replace(on_cpu, saves_in_background=True)).total - needed(on_cpu).total == copied
    shares = dict(forecasts(copying)), dict(forecasts(plain))
    zero3 = next(sharding for sharding in shares[0] if sharding.name == "zero3")
    assert shares[0][zero3].host - shares[1][zero3].host == numel // 4 * 20
