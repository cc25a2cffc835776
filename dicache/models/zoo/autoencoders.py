"""Small autoencoders of 32 x 32 images, whose latents have mean 0 and deviation 1 in each channel."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

SIZE = 32  # height and width of the images


def new_autoencoder(widths: tuple[int, ...], channels: int, *, shift: float | None = None) -> AutoencoderKL:
    """Return an untrained autoencoder.

    Args:
        widths: Channels of the stages; each but the first halves height and width.
        channels: Of the latents.
        shift: What the pipeline adds to latents; None where it knows none.
    """
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        shift_factor=shift,
    )


def autoencoder_loss(
    autoencoder: AutoencoderKL, batch: Callable[[torch.Generator], Tensor], generator: torch.Generator
) -> Tensor:
    """Return the error of images in [-1, 1], shape (n, 3, 32, 32), and a little of the divergence of their latents."""
    images = batch(generator).to(autoencoder.device)
    posterior = autoencoder.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(autoencoder.device)
    decoded = autoencoder.decode(posterior.mean + posterior.std * noise).sample
    likeness = F.mse_loss(decoded.float(), images) + 0.1 * F.l1_loss(decoded.float(), images)
    error: Tensor = likeness + 1e-6 * posterior.kl().mean()
    return error


@torch.no_grad()
def normalise_latents(autoencoder: AutoencoderKL, images: Tensor) -> None:
    """Fold the latents' mean and deviation per channel into the 1 x 1 convolutions.

    Pipelines know one scaling factor for all channels, and most of them no shift.
    """
    mean = autoencoder.encode(images).latent_dist.mean  # (n, channels, height, width)
    shift = mean.mean(dim=(0, 2, 3))
    scale = mean.std(dim=(0, 2, 3))
    into, out = autoencoder.quant_conv, autoencoder.post_quant_conv
    channels = len(shift)
    into.weight[:channels] /= scale[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - shift) / scale
    into.bias[channels:] -= 2 * scale.log()  # the other half is the log variance
    out.bias += out.weight[:, :, 0, 0] @ shift
    out.weight *= scale[None, :, None, None]


@torch.no_grad()
def kept(autoencoder: AutoencoderKL, images: Tensor) -> float:
    """Return how well images in [-1, 1], shape (n, 3, 32, 32), are returned: the PSNR in dB."""
    images = images.to(autoencoder.device)
    decoded = autoencoder.decode(autoencoder.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    return float(10 * torch.log10(4 / (decoded - images).square().mean()))
