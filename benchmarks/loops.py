"""Hand-written loops that truly skip the work: what a cache can reach at best.

Each is a generator that yields the latents when it is ready to begin, and after every denoising step, so that variants
can advance in lockstep.
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn

import dicache

GUIDANCE = 4.0


SHAPES = {  # layers, heads, width, and the side of the square of tokens
    "noop": (28, 2, 32, 2),
    "digits": (12, 3, 96, 8),
    "small": (8, 4, 128, 8),
    "medium": (12, 6, 384, 16),
    "dit-xl": (28, 16, 1152, 16),  # takes a GPU
}


def make_model(layers: int, heads: int, width: int, side: int) -> Any:
    """Return a DiT of random weights with side x side tokens, in which every block matters."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        sample_size=side,
        patch_size=1,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


class Loop:
    """The parts of one guided DDIM loop on a DiT."""

    def __init__(self, model: Any, steps: int) -> None:
        self.model = model
        self.scheduler = DDIMScheduler(clip_sample=False)
        device = next(model.parameters()).device
        self.scheduler.set_timesteps(steps, device=device)
        side = model.config.sample_size
        self.start = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(device)
        self.labels = torch.tensor([3, 1000], device=device)

    def denoise(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Take one step with the model's prediction for both halves of the batch."""
        cond, uncond = noise.chunk(2)
        guided = uncond + GUIDANCE * (cond - uncond)
        step: Tensor = self.scheduler.step(guided, t, latents).prev_sample
        return step

    def call(self, latents: Tensor, t: Tensor) -> Tensor:
        both = torch.cat([latents, latents])
        out: Tensor = self.model(both, timestep=t.expand(2), class_labels=self.labels).sample
        return out


def plain(model: Any, steps: int) -> Iterator[Tensor]:
    """Run the model as it is."""
    loop = Loop(model, steps)
    yield (latents := loop.start)
    for t in loop.scheduler.timesteps:
        latents = loop.denoise(latents, t, loop.call(latents, t))
        yield latents


def cached(model: Any, steps: int, cache: dicache.Cache) -> Iterator[Tensor]:
    """Run the model with a schedule attached."""
    loop = Loop(model, steps)
    yield (latents := loop.start)
    cache.begin_generation(steps)
    for t in loop.scheduler.timesteps:
        cache.begin_step()
        latents = loop.denoise(latents, t, loop.call(latents, t))
        yield latents


def branches_by_hand(model: Any, steps: int, computes: str) -> Iterator[Tensor]:
    """Reuse the outputs of attention and MLP; a cheap step runs only modulation layers and gated sums."""
    loop = Loop(model, steps)
    yield (latents := loop.start)
    kept: list[tuple[Tensor, Tensor]] = []
    for t, letter in zip(loop.scheduler.timesteps, computes, strict=True):
        x, time = model.pos_embed(torch.cat([latents, latents])), t.expand(2)
        if letter == "C":
            kept.clear()
        for index, block in enumerate(model.transformer_blocks):
            if letter == "C":
                normed, gate_attn, shift, scale, gate_mlp = block.norm1(x, time, loop.labels, hidden_dtype=x.dtype)
                attn = block.attn1(normed)
                x = gate_attn.unsqueeze(1) * attn + x
                mlp = block.ff(block.norm3(x) * (1 + scale[:, None]) + shift[:, None])
                x = gate_mlp.unsqueeze(1) * mlp + x
                kept.append((attn, mlp))
            else:
                norm = block.norm1
                embedded = norm.linear(norm.silu(norm.emb(time, loop.labels, hidden_dtype=x.dtype)))
                _, _, gate_attn, _, _, gate_mlp = embedded.chunk(6, dim=1)
                attn, mlp = kept[index]
                x = gate_attn.unsqueeze(1) * attn + x
                x = gate_mlp.unsqueeze(1) * mlp + x
        latents = loop.denoise(latents, t, head(model, x, time, loop.labels))
        yield latents


def body_by_hand(model: Any, steps: int, computes: str) -> Iterator[Tensor]:
    """Reuse the change that all blocks make together; a cheap step runs no block."""
    loop = Loop(model, steps)
    yield (latents := loop.start)
    delta = torch.empty(0)
    for t, letter in zip(loop.scheduler.timesteps, computes, strict=True):
        into, time = model.pos_embed(torch.cat([latents, latents])), t.expand(2)
        if letter == "C":
            x = into
            for block in model.transformer_blocks:
                x = block(x, timestep=time, class_labels=loop.labels)
            delta = x - into
        else:
            x = into + delta
        latents = loop.denoise(latents, t, head(model, x, time, loop.labels))
        yield latents


def head(model: Any, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
    """Return what DiTTransformer2DModel makes of its last block's output."""
    conditioning = model.transformer_blocks[0].norm1.emb(time, labels, hidden_dtype=x.dtype)
    shift, scale = model.proj_out_1(nn.functional.silu(conditioning)).chunk(2, dim=1)
    x = model.proj_out_2(model.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
    side = int(x.shape[1] ** 0.5)
    out: Tensor = x.reshape(-1, side, side, 1, 1, 4).permute(0, 5, 1, 3, 2, 4).reshape(-1, 4, side, side)
    return out
