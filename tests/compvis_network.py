"""The first stage as CompVis' checkpoints name it, written from the architecture; it draws every tensor it needs.

So its state dict and its outputs come from one place, and no map of names stands between them. Float64 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

GROUPS = 32


@dataclass
class CompVisNetwork:
    """KL where `n_embed` is 0, else VQ."""

    ch: int = 32
    ch_mult: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 1
    resolution: int = 16
    attn_resolutions: tuple[int, ...] = ()
    attn_type: str = "vanilla"
    z_channels: int = 3
    embed_dim: int = 3
    n_embed: int = 0
    device: str = "cpu"
    """On `meta` it has shapes only, and costs nothing at any size."""
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = torch.Generator().manual_seed(3)
        image = torch.zeros(1, 3, self.resolution, self.resolution, dtype=torch.float64, device=self.device)
        self.decode(self.encode(image)[:, : self.embed_dim])

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors as a checkpoint has them: float32."""
        return {name: tensor.float() for name, tensor in self.weights.items()}

    def yaml(self, *, target: str = "", inside_ldm: bool = False) -> str:
        """Return the training's configuration, of the autoencoder alone or of a latent diffusion model around it."""
        ddconfig = {
            "double_z": not self.n_embed,
            "z_channels": self.z_channels,
            "resolution": self.resolution,
            "in_channels": 3,
            "out_ch": 3,
            "ch": self.ch,
            "ch_mult": list(self.ch_mult),
            "num_res_blocks": self.num_res_blocks,
            "attn_resolutions": list(self.attn_resolutions),
            "dropout": 0.0,
        }
        if self.attn_type != "vanilla":
            ddconfig["attn_type"] = self.attn_type
        codebook = {"n_embed": self.n_embed} if self.n_embed else {}
        own: dict[str, Any] = {
            "target": target or f"ldm.models.autoencoder.{'VQModelInterface' if self.n_embed else 'AutoencoderKL'}",
            "params": {"embed_dim": self.embed_dim, **codebook, "ddconfig": ddconfig},
        }
        ldm = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {"first_stage_config": own}}
        return yaml.safe_dump({"model": ldm if inside_ldm else own})

    def encode(self, image: Tensor) -> Tensor:
        """Return moments, or for VQ the latent before quantisation."""
        hidden = self._conv("encoder.conv_in", image, self.ch)
        for level, mult in enumerate(self.ch_mult):
            for i in range(self.num_res_blocks):
                hidden = self._block(f"encoder.down.{level}.block.{i}", hidden, self.ch * mult)
                if self.resolution >> level in self.attn_resolutions:
                    hidden = self._attention(f"encoder.down.{level}.attn.{i}", hidden)
            if level < len(self.ch_mult) - 1:
                padded = F.pad(hidden, (0, 1, 0, 1))
                hidden = self._conv(f"encoder.down.{level}.downsample.conv", padded, hidden.shape[1], stride=2, pad=0)
        both = 1 if self.n_embed else 2
        hidden = self._head("encoder", self._middle("encoder", hidden), both * self.z_channels)
        return self._conv("quant_conv", hidden, both * self.embed_dim, side=1)

    def decode(self, latent: Tensor) -> Tensor:
        """Return the image of a latent, which VQ quantises first."""
        if self.n_embed:
            latent = self.quantized(latent)
        hidden = self._conv("post_quant_conv", latent, self.z_channels, side=1)
        hidden = self._middle("decoder", self._conv("decoder.conv_in", hidden, self.ch * self.ch_mult[-1]))
        for level, mult in reversed(list(enumerate(self.ch_mult))):
            for i in range(self.num_res_blocks + 1):
                hidden = self._block(f"decoder.up.{level}.block.{i}", hidden, self.ch * mult)
                if self.resolution >> level in self.attn_resolutions:
                    hidden = self._attention(f"decoder.up.{level}.attn.{i}", hidden)
            if level:
                doubled = hidden.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                hidden = self._conv(f"decoder.up.{level}.upsample.conv", doubled, hidden.shape[1])
        return self._head("decoder", hidden, 3)

    def quantized(self, latent: Tensor) -> Tensor:
        """Return each position's nearest code, by all distances at once."""
        book = self._tensor("quantize.embedding.weight", (self.n_embed, self.embed_dim), 1.0)
        apart = (latent[:, None] - book[None, :, :, None, None]).square().sum(dim=2)  # b n h w
        return book[apart.argmin(dim=1)].permute(0, 3, 1, 2)

    def _middle(self, half: str, hidden: Tensor) -> Tensor:
        hidden = self._block(f"{half}.mid.block_1", hidden, hidden.shape[1])
        if self.attn_type != "none":
            hidden = self._attention(f"{half}.mid.attn_1", hidden)
        return self._block(f"{half}.mid.block_2", hidden, hidden.shape[1])

    def _head(self, half: str, hidden: Tensor, channels: int) -> Tensor:
        return self._conv(f"{half}.conv_out", F.silu(self._norm(f"{half}.norm_out", hidden)), channels)

    def _block(self, name: str, hidden: Tensor, channels: int) -> Tensor:
        added = self._conv(f"{name}.conv1", F.silu(self._norm(f"{name}.norm1", hidden)), channels)
        added = self._conv(f"{name}.conv2", F.silu(self._norm(f"{name}.norm2", added)), channels)
        is_wider = hidden.shape[1] != channels
        return added + (self._conv(f"{name}.nin_shortcut", hidden, channels, side=1) if is_wider else hidden)

    def _attention(self, name: str, hidden: Tensor) -> Tensor:
        if self.attn_type == "none":
            return hidden
        normed, channels = self._norm(f"{name}.norm", hidden), hidden.shape[1]
        query, key, value = (
            self._conv(f"{name}.{part}", normed, channels, side=1).flatten(2) for part in "qkv"
        )  # b c hw
        weights = torch.einsum("bci,bcj->bij", query, key).mul(channels**-0.5).softmax(dim=2)
        gathered = torch.einsum("bij,bcj->bci", weights, value).reshape(hidden.shape)
        return hidden + self._conv(f"{name}.proj_out", gathered, channels, side=1)

    def _conv(
        self, name: str, hidden: Tensor, channels: int, *, side: int = 3, stride: int = 1, pad: int | None = None
    ) -> Tensor:
        fan_in = hidden.shape[1] * side**2
        weight = self._tensor(f"{name}.weight", (channels, hidden.shape[1], side, side), fan_in**-0.5)
        bias = self._tensor(f"{name}.bias", (channels,), 0.3)
        return F.conv2d(hidden, weight, bias, stride=stride, padding=side // 2 if pad is None else pad)

    def _norm(self, name: str, hidden: Tensor) -> Tensor:
        scale = self._tensor(f"{name}.weight", (hidden.shape[1],), 1.0)
        return F.group_norm(hidden, GROUPS, scale, self._tensor(f"{name}.bias", (hidden.shape[1],), 0.3), eps=1e-6)

    def _tensor(self, name: str, shape: tuple[int, ...], scale: float) -> Tensor:
        if name not in self.weights:
            # Drawn as float32, so that a checkpoint of float32 holds the very same numbers.
            drawn = (
                torch.randn(shape, generator=self._random)
                if self.device == "cpu"
                else torch.empty(shape, device="meta")
            )
            self.weights[name] = (drawn * scale).double().to(self.device)
        assert self.weights[name].shape == shape, name
        return self.weights[name]
