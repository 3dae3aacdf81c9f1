"""Laws of how a loaded denoiser is called: what steps share is computed once, half precision, compiled."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from jobs.wiring.picture_settings import repeated_here, settings_in
from ldm.conditioning.conditioner import ConditionalDenoiser, Conditioner, ConditioningConfig, TextUse
from ldm.conditioning.transformer import TokenTransformerConfig
from ldm.precision import Precision
from ldm.remembered import MOST_INPUTS, Remembered, Remembering, steps_share
from ldm.samplers.network import NetworkForms
from ldm.samplers.tiles import tiled_network
from ldm.text_to_image import TextToImage
from ldm.types import Condition
from ldm.unet import zoo as unets
from ldm.unet.attention import Attention
from tests.test_drawing import DRAWING, config_of, drawn, folder, model
from tests.test_unet import awake

__all__ = ["folder", "model"]  # fixtures: a small trained model

LAYOUT = ConditioningConfig(
    text=TextUse.NONE,
    has_layout=True,
    layout_transformer=TokenTransformerConfig(vocab_size=17, max_tokens=5, depth=1, num_heads=1, head_channels=8),
)


class Calls:
    """Counts the calls of modules, for as long as it is entered."""

    def __init__(self, *modules: nn.Module) -> None:
        self.number = 0
        self._hooks = [module.register_forward_hook(self._count) for module in modules]

    def _count(self, *_: object) -> None:
        self.number += 1

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def reading(network: nn.Module) -> list[nn.Module]:
    """Return what makes keys of tokens that are told."""
    made = [part for part in network.modules() if isinstance(part, Attention)]
    return [part.to_k for part in made if part.to_k.in_features != part.to_q.in_features]


def layout_denoiser() -> ConditionalDenoiser:
    config = replace(unets.emoji(), base_channels=16, channel_mult=(1, 2), attention_factors=(1, 2), head_channels=8)
    config = replace(config, context_width=24, norm_groups=8)
    network = ConditionalDenoiser(awake(config), Conditioner(LAYOUT, 24))
    return network.eval().requires_grad_(False)


def test_the_keys_of_a_batchs_prompts_are_made_once_for_all_steps(model: TextToImage) -> None:
    asked = {"prompts": ["red", "a blue square"], "seeds": [1, 2], "guidance": [3.0, 1.0], "drawing": DRAWING}
    parts = reading(model._unet)
    assert len(parts) > 1
    with Calls(*parts) as calls, Calls(model._unet) as steps:
        model.generate(**asked)
    assert (calls.number, steps.number) == (len(parts), DRAWING.sampler.num_steps)
    with Calls(*parts) as calls:
        model.generate(**asked, batch_size=1)  # one of them is not guided
    assert calls.number == 2 * len(parts)


def test_between_two_drawings_the_weights_that_are_remembered_through_may_change() -> None:
    network = layout_denoiser()
    condition = Condition(layout=torch.tensor([[3, 1, 2, 0, 15]]))
    noisy, time = torch.randn(1, 4, 8, 8), torch.zeros(1)
    with steps_share(network):
        before = network(noisy, time, condition)
        assert (network(noisy, time, condition) == before).all()
    for weight in (*(part.weight for part in reading(network)), *network.conditioner.parameters()):
        weight += 0.1 * torch.randn(weight.shape)
    changed = copy.deepcopy(network)(noisy, time, condition)
    assert not (changed == before).all()
    with steps_share(network):
        assert (network(noisy, time, condition) == changed).all()
    with pytest.raises(RuntimeError), steps_share(network):
        raise RuntimeError
    assert [part for part in network.modules() if isinstance(part, Remembering) and part.memory is not None] == []


def test_a_layout_is_read_once_whatever_the_steps_and_tiles() -> None:
    network = layout_denoiser()
    condition = Condition(layout=torch.tensor([[3, 1, 2, 0, 15], [5, 1, 2, 0, 15]]))
    noisy = torch.randn(2, 4, 24, 16)
    tiled = tiled_network(network, 8)
    plain = tiled(noisy, torch.zeros(2), condition)
    layout = network.conditioner.layout
    assert layout is not None
    with steps_share(network), Calls(layout, *reading(network)) as calls:
        for _ in range(3):
            assert (tiled(noisy, torch.zeros(2), condition) == plain).all()
    assert calls.number == 1 + len(reading(network))


def test_what_is_remembered_is_of_the_very_objects_and_of_the_last_few() -> None:
    memory, made = Remembered(), []
    one, other = [1], [1]

    def make(name: str) -> str:
        made.append(name)
        return name

    assert [memory.of((one, None), lambda: make("one")) for _ in range(2)] == ["one", "one"]
    assert memory.of((other, None), lambda: make("other")) == "other"  # equal, and another
    assert made == ["one", "other"]
    kept = [[number] for number in range(MOST_INPUTS)]
    for each in kept:
        memory.of((each,), lambda: make("more"))
    assert memory.of((one, None), lambda: make("again")) == "again"


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
def test_half_precision_draws_nearly_the_same_and_leaves_the_model_as_it_was(
    model: TextToImage, precision: Precision
) -> None:
    plain = model.generate(["red"], seeds=[1], guidance=[3.0], drawing=DRAWING)
    half = model.generate(["red"], seeds=[1], guidance=[3.0], drawing=replace(DRAWING, precision=precision))
    apart = np.abs(half.astype(int) - plain.astype(int))
    assert 0 < apart.mean() < 8.0
    assert (model.generate(["red"], seeds=[1], guidance=[3.0], drawing=DRAWING) == plain).all()


def test_a_picture_says_its_precision_and_is_repeated_in_it(folder, tmp_path) -> None:
    config = config_of(folder, tmp_path, precision=Precision.BF16, prompts=("red",), guidance=(3.0,), is_separate=True)
    (path,) = drawn(config)
    assert settings_in(path.read_bytes())["precision"] == "bf16"
    again = repeated_here(config_of(folder, tmp_path / "again"), settings_in(path.read_bytes()))
    assert again.precision is Precision.BF16
    assert drawn(again)[0].read_bytes() == path.read_bytes()


def test_a_callable_that_is_no_module_has_one_form() -> None:
    forms = NetworkForms(lambda noisy, timestep, condition: noisy)
    assert forms.of(Precision.FP32, is_compiled=False) is forms.of(Precision.FP32, is_compiled=False)
    with pytest.raises(ValueError, match="bf16 and compiling are of a loaded denoiser"):
        forms.of(Precision.BF16, is_compiled=False)


def test_forms_are_made_once_and_a_compiled_one_has_no_weights_of_its_own() -> None:
    network = layout_denoiser()
    forms = NetworkForms(network)
    for precision, is_compiled in ((Precision.BF16, False), (Precision.BF16, True), (Precision.FP32, True)):
        assert forms.of(precision, is_compiled=is_compiled) is forms.of(precision, is_compiled=is_compiled)
        shared = [weight.data_ptr() for weight in forms.of(precision, is_compiled=is_compiled).parameters()]
        assert shared == [weight.data_ptr() for weight in forms.of(precision, is_compiled=False).parameters()]
    assert {weight.dtype for weight in forms.of(Precision.BF16, is_compiled=True).parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
