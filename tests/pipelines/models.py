"""Tiny models with random weights of the kinds that `tests.tiny` has not, and their pipelines without encoders."""

from typing import Any

from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.latte.pipeline_latte import LattePipeline
from torch import nn

from tests.tiny import CAPTION, CHANNELS, POOLED, TEXT_TOKENS, latte, pixart, randomised

SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3}


def cogvideox() -> nn.Module:
    sizes = {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": TEXT_TOKENS}
    widths = {"in_channels": CHANNELS, "out_channels": CHANNELS, "time_embed_dim": 8, "text_embed_dim": CAPTION}
    return randomised(CogVideoXTransformer3DModel(**{**SMALL, "attention_head_dim": 8}, **sizes, **widths))


def wan(seed: int = 0) -> nn.Module:
    widths = {"in_channels": CHANNELS, "out_channels": CHANNELS, "text_dim": CAPTION, "freq_dim": 8, "ffn_dim": 32}
    return randomised(WanTransformer3DModel(**SMALL, **widths, patch_size=(1, 2, 2), rope_max_seq_len=32), seed)


def hunyuan_video() -> nn.Module:
    widths = {"in_channels": CHANNELS, "out_channels": CHANNELS, "rope_axes_dim": (4, 4, 4)}
    given = {"text_embed_dim": CAPTION, "pooled_projection_dim": POOLED, "num_refiner_layers": 1}
    return randomised(HunyuanVideoTransformer3DModel(**SMALL, **widths, **given, num_single_layers=2))


def ltx() -> nn.Module:
    widths = {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 24, "caption_channels": CAPTION}
    return randomised(LTXVideoTransformer3DModel(**SMALL, **widths))


def lumina2() -> nn.Module:
    return randomised(
        Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=CHANNELS,
            hidden_size=24,
            num_layers=3,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(32, 32, 32),
            cap_feat_dim=CAPTION,
        )
    )


def qwen_image() -> nn.Module:
    widths = {"in_channels": 4 * CHANNELS, "out_channels": CHANNELS, "joint_attention_dim": CAPTION}
    return randomised(QwenImageTransformer2DModel(**SMALL, **widths, axes_dims_rope=(4, 4, 4)))


def sana() -> nn.Module:
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24}
    widths = {"in_channels": CHANNELS, "out_channels": CHANNELS, "caption_channels": CAPTION, "sample_size": 8}
    return randomised(SanaTransformer2DModel(**SMALL, **cross, **widths))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart_sigma_pipeline() -> Any:
    return quiet(PixArtSigmaPipeline(None, None, None, pixart(), DPMSolverMultistepScheduler()))


def latte_pipeline() -> Any:
    return quiet(LattePipeline(None, None, None, latte(), DDIMScheduler()))


def cogvideox_pipeline() -> Any:
    return quiet(CogVideoXPipeline(None, None, None, cogvideox(), CogVideoXDDIMScheduler()))


def wan_pipeline() -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(WanPipeline(None, None, None, scheduler, wan()))


def wan_of_two_pipeline() -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(WanPipeline(None, None, None, scheduler, wan(), wan(1), boundary_ratio=0.7))


def hunyuan_video_pipeline() -> Any:
    return quiet(
        HunyuanVideoPipeline(None, None, hunyuan_video(), None, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None)
    )


def ltx_pipeline() -> Any:
    return quiet(LTXPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, ltx()))


def lumina2_pipeline() -> Any:
    return quiet(Lumina2Pipeline(lumina2(), FlowMatchEulerDiscreteScheduler(), None, None, None))


def qwen_image_pipeline() -> Any:
    return quiet(QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, qwen_image()))


def sana_pipeline() -> Any:
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, final_sigmas_type="zero"
    )
    return quiet(SanaPipeline(None, None, None, sana(), scheduler))
