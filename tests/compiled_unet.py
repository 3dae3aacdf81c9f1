"""Compiles UNets that between them have every form, each as one graph, and says how far they are from the plain ones.

The differences come as JSON on standard output. A program of its own, since tests check shapes by a hook that no
compiler sees through.
"""

from __future__ import annotations

import copy
import dataclasses
import json

import torch

from ldm.precision import Precision
from ldm.remembered import steps_share
from ldm.samplers.network import NetworkForms
from ldm.unet.model import UNetConfig
from tests.test_unet import awake
from tests.test_unet_forms import FORMS, given

COMPILED = {
    "transformers, all conditions": dataclasses.replace(
        FORMS["sdxl"], channel_mult=(1, 2), attention_factors=(2,), transformer_depth=1, in_channels=9
    ),
    "plain attention": dataclasses.replace(FORMS["churches"], in_channels=7, checkpoint_activations=True),
}


def difference(config: UNetConfig) -> float:
    """Return the largest difference of the compiled network's prediction; a break of the graph is an error."""
    torch.compiler.reset()
    model = awake(config)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    inputs = given(config)
    return float((compiled(*inputs) - model(*inputs)).detach().abs().max())


def drawing_difference() -> float:
    """Return that of a network which was compiled to draw with."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    config = dataclasses.replace(FORMS["sdxl"], channel_mult=(1,), attention_factors=(1,), transformer_depth=1)
    model = awake(config).eval().requires_grad_(False)
    compiled = NetworkForms(model).of(Precision.FP32, is_compiled=True)
    assert compiled is not model
    inputs = given(config)
    differences = []
    for condition in (inputs[2], inputs[2], copy.deepcopy(inputs[2])):  # as two drawings do
        with steps_share(compiled), torch.no_grad():
            for _ in range(2):
                found = compiled(inputs[0], inputs[1], condition)
        differences.append(float((found - model(*inputs)).abs().max()))
    assert counters["unique_graphs"] == 1, f"{counters['unique_graphs']} graphs were compiled, not one"
    return max(differences)


def main() -> None:
    torch.set_num_threads(1)
    found = {name: difference(config) for name, config in COMPILED.items()}
    print(json.dumps(found | {"drawing": drawing_difference()}))


if __name__ == "__main__":
    main()
