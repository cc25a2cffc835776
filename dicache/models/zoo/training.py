"""One seeded, resumable training stage; a recipe strings several of them together."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dicache.schedules.replacing import replacing

SECONDS_BETWEEN_CHECKPOINTS = 30.0
STEPS_BETWEEN_POINTS = 50  # of the loss curve


def fit(
    stage: str,
    module: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    learning_rate: float,
    work: Path,
    seed: int,
    boosted: tuple[nn.Parameter, ...] = (),
    ema_decay: float = 0.998,
    bf16: bool = False,
) -> None:
    """Train `module` in place and leave it with the moving average of its weights.

    The state is written to `work/<stage>.pt` twice a minute and at the end, so that a killed
    training goes on from there, and one that is done is only loaded. The loss, smoothed, is written
    beside it to `work/<stage>.csv`.

    Args:
        stage: Name of the stage: its checkpoint and its progress bar.
        module: What is trained; every parameter that requires a gradient.
        loss: Draws one batch with the generator and returns its scalar loss.
        steps: Optimiser steps; the learning rate warms up over 100 of them and falls as a cosine.
        learning_rate: Peak learning rate of AdamW.
        work: Folder of the checkpoints.
        seed: Seeds the generator of the batches.
        boosted: Parameters that learn four times as fast (label embeddings: few rows are seen a step).
        ema_decay: Decay of the moving average.
        bf16: Whether the loss runs under bfloat16 autocast.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    boosted_ids = {id(p) for p in boosted}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if id(p) not in boosted_ids], "boost": 1.0},
            {"params": list(boosted), "boost": 4.0},
        ],
        lr=learning_rate,
        betas=(0.9, 0.99),
        weight_decay=0.0,
    )
    average = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    device = parameters[0].device
    checkpoint = work / f"{stage}.pt"
    start = 0
    smooth = math.nan
    curve: list[tuple[int, float]] = []  # step and smoothed loss
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        start = state["step"]
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
        generator.set_state(state["generator"].cpu())
        smooth, curve = state["smooth"], state["curve"]

    def save(step: int) -> None:
        with replacing(checkpoint) as part:
            torch.save(
                {
                    "step": step,
                    "module": module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average,
                    "generator": generator.get_state(),
                    "smooth": smooth,
                    "curve": curve,
                },
                part,
            )
        lines = ["step,loss", *(f"{at},{value:.6f}" for at, value in curve)]
        checkpoint.with_suffix(".csv").write_text("\n".join(lines) + "\n")

    module.train()
    saved = time.monotonic()
    with tqdm(total=steps, initial=start, desc=stage, mininterval=2.0) as bar:
        for step in range(start, steps):
            rate = learning_rate * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["boost"]
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                value = loss(generator)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            # A young average follows the weights closely, or it would remember the initialisation.
            decay = min(ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            smooth = value.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * value.item()
            if (step + 1) % STEPS_BETWEEN_POINTS == 0:
                curve.append((step + 1, smooth))
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            bar.update()
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                save(step + 1)
                saved = time.monotonic()
    save(steps)
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    module.eval()
