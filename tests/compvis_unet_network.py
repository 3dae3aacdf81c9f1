"""The UNet as CompVis' checkpoints name it, written from the architecture; it draws every tensor it needs.

So its state dict and its outputs come from one place, and no map of names stands between them. Float64 throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

GROUPS = 32


@dataclass
class CompVisUNet:
    """Transformers where `context_dim` is set, else plain attention; a vector of `adm_in_channels` where it is set."""

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 32
    channel_mult: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 1
    attention_resolutions: tuple[int, ...] = (2,)
    num_heads: int = -1
    num_head_channels: int = -1
    context_dim: int | None = None
    transformer_depth: int | tuple[int, ...] = 1
    use_linear_in_transformer: bool = False
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    adm_in_channels: int | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = torch.Generator().manual_seed(3)
        side = 2 ** len(self.channel_mult)
        context = None if self.context_dim is None else torch.zeros(1, 1, self.context_dim).double()
        vector = None if self.adm_in_channels is None else torch.zeros(1, self.adm_in_channels).double()
        self(torch.zeros(1, self.in_channels, side, side).double(), torch.zeros(1), context, vector)

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors as a checkpoint has them: float32, behind the name of the whole model's network."""
        return {f"model.diffusion_model.{name}": tensor.float() for name, tensor in self.weights.items()}

    @property
    def averaged(self) -> dict[str, Tensor]:
        """Return other tensors under the names of the averaged ones, and what else lies beside them."""
        flat = {name.replace(".", ""): 0.5 * tensor.float() for name, tensor in self.weights.items()}
        named = {f"model_ema.diffusion_model{name}": tensor for name, tensor in flat.items()}
        return named | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}

    def yaml(self, *, key: str = "unet_config", **changes: Any) -> str:
        """Return the training's configuration with the network under `key`."""
        params: dict[str, Any] = {
            "image_size": 8,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "model_channels": self.model_channels,
            "attention_resolutions": list(self.attention_resolutions),
            "num_res_blocks": self.num_res_blocks,
            "channel_mult": list(self.channel_mult),
        }
        if self.context_dim is not None:
            depth = self.transformer_depth
            params |= {"use_spatial_transformer": True, "context_dim": self.context_dim}
            params |= {"transformer_depth": depth if isinstance(depth, int) else list(depth)}
        if self.adm_in_channels is not None:
            params |= {"num_classes": "sequential", "adm_in_channels": self.adm_in_channels}
        flags = ("use_linear_in_transformer", "use_scale_shift_norm", "resblock_updown", "use_new_attention_order")
        params |= {name: True for name in flags if getattr(self, name)}
        params |= {name: getattr(self, name) for name in ("num_heads", "num_head_channels") if getattr(self, name) > 0}
        params |= changes
        params = {name: value for name, value in params.items() if value != "absent"}
        target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
        return yaml.safe_dump({"model": {"params": {key: {"target": target, "params": params}}}})

    def __call__(self, noisy: Tensor, timestep: Tensor, context: Tensor | None, vector: Tensor | None) -> Tensor:
        """Return the prediction."""
        embedded = self._mlp("time_embed", self._waves(timestep))
        if vector is not None:
            embedded = embedded + self._mlp("label_emb.0", vector)
        hidden = self._conv("input_blocks.0.0", noisy, self.model_channels)
        kept, number, factor = [hidden], 1, 1
        for level, mult in enumerate(self.channel_mult):
            for _ in range(self.num_res_blocks):
                hidden = self._block(f"input_blocks.{number}.0", hidden, self.model_channels * mult, embedded)
                if factor in self.attention_resolutions:
                    hidden = self._attention(f"input_blocks.{number}.1", hidden, context, level)
                kept.append(hidden)
                number += 1
            if level < len(self.channel_mult) - 1:
                hidden = self._halved(f"input_blocks.{number}.0", hidden, embedded)
                kept.append(hidden)
                number, factor = number + 1, factor * 2
        hidden = self._block("middle_block.0", hidden, hidden.shape[1], embedded)
        hidden = self._attention("middle_block.1", hidden, context, len(self.channel_mult) - 1)
        hidden = self._block("middle_block.2", hidden, hidden.shape[1], embedded)
        number = 0
        for level in reversed(range(len(self.channel_mult))):
            for index in range(self.num_res_blocks + 1):
                both = torch.cat([hidden, kept.pop()], dim=1)
                name, place = f"output_blocks.{number}", 1
                hidden = self._block(f"{name}.0", both, self.model_channels * self.channel_mult[level], embedded)
                if factor in self.attention_resolutions:
                    hidden, place = self._attention(f"{name}.1", hidden, context, level), 2
                if level and index == self.num_res_blocks:
                    hidden, factor = self._doubled(f"{name}.{place}", hidden, embedded), factor // 2
                number += 1
        return self._conv("out.2", F.silu(self._norm("out.0", hidden, 1e-5)), self.out_channels)

    def _waves(self, timestep: Tensor) -> Tensor:
        half = self.model_channels // 2
        angles = [timestep.double() * math.exp(-math.log(10000) * i / half) for i in range(half)]
        return torch.stack([angle.cos() for angle in angles] + [angle.sin() for angle in angles], dim=1)

    def _mlp(self, name: str, hidden: Tensor) -> Tensor:
        width = 4 * self.model_channels
        return self._linear(f"{name}.2", F.silu(self._linear(f"{name}.0", hidden, width)), width)

    def _halved(self, name: str, hidden: Tensor, embedded: Tensor) -> Tensor:
        if self.resblock_updown:
            return self._block(name, hidden, hidden.shape[1], embedded, resize=lambda each: F.avg_pool2d(each, 2))
        return self._conv(f"{name}.op", hidden, hidden.shape[1], stride=2)

    def _doubled(self, name: str, hidden: Tensor, embedded: Tensor) -> Tensor:
        def double(each: Tensor) -> Tensor:
            return each.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

        if self.resblock_updown:
            return self._block(name, hidden, hidden.shape[1], embedded, resize=double)
        return self._conv(f"{name}.conv", double(hidden), hidden.shape[1])

    def _block(
        self, name: str, hidden: Tensor, channels: int, embedded: Tensor, resize: Any = lambda each: each
    ) -> Tensor:
        added = resize(F.silu(self._norm(f"{name}.in_layers.0", hidden, 1e-5)))
        added = self._conv(f"{name}.in_layers.2", added, channels)
        hidden = resize(hidden)
        width = 2 * channels if self.use_scale_shift_norm else channels
        time = self._linear(f"{name}.emb_layers.1", F.silu(embedded), width)[:, :, None, None]
        if self.use_scale_shift_norm:
            normed = self._norm(f"{name}.out_layers.0", added, 1e-5)
            added = normed * (1 + time[:, :channels]) + time[:, channels:]
        else:
            added = self._norm(f"{name}.out_layers.0", added + time, 1e-5)
        added = self._conv(f"{name}.out_layers.3", F.silu(added), channels)
        if hidden.shape[1] != channels:
            hidden = self._conv(f"{name}.skip_connection", hidden, channels, side=1)
        return hidden + added

    def _attention(self, name: str, hidden: Tensor, context: Tensor | None, level: int) -> Tensor:
        channels = hidden.shape[1]
        heads = channels // self.num_head_channels if self.num_head_channels > 0 else self.num_heads
        if self.context_dim is None:
            return self._plain(name, hidden, heads)
        depth = self.transformer_depth
        return self._transformer(name, hidden, context, heads, depth if isinstance(depth, int) else depth[level])

    def _plain(self, name: str, hidden: Tensor, heads: int) -> Tensor:
        channels, width = hidden.shape[1], hidden.shape[1] // heads
        tokens = self._norm(f"{name}.norm", hidden, 1e-5).flatten(2)  # b c n
        rows = F.conv1d(tokens, *self._weights(f"{name}.qkv", (3 * channels, channels, 1)))  # b 3c n
        gathered = []
        for head in range(heads):
            if self.use_new_attention_order:
                starts = [part * channels + head * width for part in range(3)]
            else:
                starts = [(3 * head + part) * width for part in range(3)]
            query, key, value = (rows[:, start : start + width] for start in starts)  # b w n
            weights = (query.transpose(1, 2) @ key / math.sqrt(width)).softmax(dim=2)
            gathered.append(value @ weights.transpose(1, 2))
        added = F.conv1d(torch.cat(gathered, dim=1), *self._weights(f"{name}.proj_out", (channels, channels, 1)))
        return hidden + added.reshape(hidden.shape)

    def _transformer(self, name: str, hidden: Tensor, context: Tensor | None, heads: int, depth: int) -> Tensor:
        tokens = self._projected(f"{name}.proj_in", self._norm(f"{name}.norm", hidden, 1e-6).flatten(2).mT)
        for index in range(depth):
            block = f"{name}.transformer_blocks.{index}"
            normed = self._layer_norm(f"{block}.norm1", tokens)
            tokens = tokens + self._gathered(f"{block}.attn1", normed, normed, heads)
            normed = self._layer_norm(f"{block}.norm2", tokens)
            tokens = tokens + self._gathered(f"{block}.attn2", normed, context, heads)
            width = tokens.shape[2]
            rows = self._linear(f"{block}.ff.net.0.proj", self._layer_norm(f"{block}.norm3", tokens), 8 * width)
            gated = rows[..., : 4 * width] * F.gelu(rows[..., 4 * width :])
            tokens = tokens + self._linear(f"{block}.ff.net.2", gated, width)
        return hidden + self._projected(f"{name}.proj_out", tokens).mT.reshape(hidden.shape)

    def _projected(self, name: str, tokens: Tensor) -> Tensor:
        channels = tokens.shape[2]
        if self.use_linear_in_transformer:
            return self._linear(name, tokens, channels)
        return F.conv2d(tokens.mT[..., None], *self._weights(name, (channels, channels, 1, 1)))[..., 0].mT

    def _gathered(self, name: str, tokens: Tensor, context: Tensor | None, heads: int) -> Tensor:
        assert context is not None
        channels = tokens.shape[2]
        query = self._linear(f"{name}.to_q", tokens, channels, has_bias=False)
        key = self._linear(f"{name}.to_k", context, channels, has_bias=False)
        value = self._linear(f"{name}.to_v", context, channels, has_bias=False)
        pairs = zip(query.chunk(heads, 2), key.chunk(heads, 2), value.chunk(heads, 2), strict=True)
        gathered = [(q @ k.mT / math.sqrt(channels // heads)).softmax(dim=2) @ v for q, k, v in pairs]
        return self._linear(f"{name}.to_out.0", torch.cat(gathered, dim=2), channels)

    def _linear(self, name: str, hidden: Tensor, width: int, *, has_bias: bool = True) -> Tensor:
        shape = (width, hidden.shape[-1])
        if has_bias:
            return F.linear(hidden, *self._weights(name, shape))
        return F.linear(hidden, self._tensor(f"{name}.weight", shape, shape[1] ** -0.5))

    def _conv(self, name: str, hidden: Tensor, channels: int, *, side: int = 3, stride: int = 1) -> Tensor:
        weight, bias = self._weights(name, (channels, hidden.shape[1], side, side))
        return F.conv2d(hidden, weight, bias, stride=stride, padding=side // 2)

    def _norm(self, name: str, hidden: Tensor, epsilon: float) -> Tensor:
        scale = self._tensor(f"{name}.weight", (hidden.shape[1],), 1.0)
        return F.group_norm(hidden, GROUPS, scale, self._tensor(f"{name}.bias", (hidden.shape[1],), 0.3), eps=epsilon)

    def _layer_norm(self, name: str, tokens: Tensor) -> Tensor:
        shape = tokens.shape[-1:]
        return F.layer_norm(
            tokens, shape, self._tensor(f"{name}.weight", shape, 1.0), self._tensor(f"{name}.bias", shape, 0.3)
        )

    def _weights(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        weight = self._tensor(f"{name}.weight", shape, math.prod(shape[1:]) ** -0.5)
        return weight, self._tensor(f"{name}.bias", shape[:1], 0.3)

    def _tensor(self, name: str, shape: tuple[int, ...], scale: float) -> Tensor:
        if name not in self.weights:
            # Drawn as float32, so that a checkpoint of float32 holds the very same numbers.
            self.weights[name] = (torch.randn(shape, generator=self._random) * scale).double()
        assert self.weights[name].shape == shape, name
        return self.weights[name]
