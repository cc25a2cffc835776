"""What `--model` takes: a bundled model, a short name, a hub id, or a folder in diffusers' format."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from dicache.models import zoo


@dataclass(frozen=True)
class Usual:
    """A published model, and how it is usually called; None leaves it to the pipeline.

    Attributes:
        repository: Hub id, in diffusers' format.
        steps: Inference steps.
        guidance: Guidance scale.
        size: Height and width in pixels.
        frames: Of a video.
        dtype: It was trained for, or is stable in.
        sampler: Class of the scheduler that the repository is configured with, for those to read who choose one.
        extra_steps: Evaluations of the denoiser that this sampler makes beyond one for each inference step.
        text_tokens: Longest prompt, where the pipeline's own default is longer than the model was made for.
    """

    repository: str
    steps: int | None = None
    guidance: float | None = None
    size: int | None = None
    frames: int | None = None
    dtype: str = "bfloat16"
    sampler: str | None = None
    text_tokens: int | None = None
    extra_steps: int = 0


DPM = "DPMSolverMultistepScheduler"
FLOW = "FlowMatchEulerDiscreteScheduler"

# From the models' own cards, and where they say nothing from the defaults of their pipelines.
HUB = {
    "cogvideox": Usual("zai-org/CogVideoX-5b", steps=50, guidance=6.0, frames=49),
    "dit": Usual("facebook/DiT-XL-2-256", steps=50, guidance=4.0, dtype="float16", sampler="DDIMScheduler"),
    "dit-512": Usual("facebook/DiT-XL-2-512", steps=50, guidance=4.0, dtype="float16", sampler="DDIMScheduler"),
    "flux": Usual("black-forest-labs/FLUX.1-dev", steps=50, guidance=3.5, size=1024, sampler=FLOW),
    "flux-schnell": Usual(
        "black-forest-labs/FLUX.1-schnell", steps=4, guidance=0.0, size=1024, sampler=FLOW, text_tokens=256
    ),
    "hunyuanvideo": Usual("hunyuanvideo-community/HunyuanVideo", steps=50, guidance=6.0),
    "latte": Usual("maxin-cn/Latte-1", steps=50, guidance=7.5, size=512, dtype="float16"),
    "ltx": Usual("Lightricks/LTX-Video", steps=50, guidance=3.0),
    "lumina2": Usual("Alpha-VLLM/Lumina-Image-2.0", steps=50, guidance=4.0, size=1024),
    "pixart": Usual(
        "PixArt-alpha/PixArt-XL-2-1024-MS", steps=20, guidance=4.5, size=1024, dtype="float16", sampler=DPM
    ),
    "pixart-512": Usual(
        "PixArt-alpha/PixArt-XL-2-512x512", steps=20, guidance=4.5, size=512, dtype="float16", sampler=DPM
    ),
    "pixart-lcm": Usual(
        "PixArt-alpha/PixArt-LCM-XL-2-1024-MS",
        steps=4,
        guidance=0.0,
        size=1024,
        dtype="float16",
        sampler="LCMScheduler",
    ),
    "pixart-sigma": Usual(
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", steps=20, guidance=4.5, size=1024, dtype="float16", sampler=DPM
    ),
    "qwen-image": Usual("Qwen/Qwen-Image", steps=50, size=1024),
    "sana": Usual("Efficient-Large-Model/Sana_1600M_1024px_diffusers", steps=20, guidance=4.5, size=1024),
    "sd15": Usual(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        steps=50,
        guidance=7.5,
        size=512,
        dtype="float16",
        sampler="PNDMScheduler",
        extra_steps=1,
    ),
    "sd3": Usual(
        "stabilityai/stable-diffusion-3-medium-diffusers",
        steps=28,
        guidance=7.0,
        size=1024,
        dtype="float16",
        sampler=FLOW,
    ),
    "sd3.5": Usual("stabilityai/stable-diffusion-3.5-large", steps=28, guidance=3.5, size=1024, sampler=FLOW),
    "sdxl": Usual(
        "stabilityai/stable-diffusion-xl-base-1.0",
        steps=50,
        guidance=5.0,
        size=1024,
        dtype="float16",
        sampler="EulerDiscreteScheduler",
    ),
    "wan": Usual("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", steps=50, guidance=5.0),
}

# What is usual for bundled models, where their pipelines' defaults are those of published ones.
BUNDLED = {
    "clips": Usual(str(zoo.folder("clips")), steps=20, guidance=1.5, dtype="float32"),
    "flow": Usual(str(zoo.folder("flow")), steps=20, guidance=2.0),
}


class ModelError(ValueError):
    """A model is not known, or cannot be loaded or called as asked."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: Short, for file names and titles.
        location: Folder or hub id, as `from_pretrained` takes it.
        bundled: Whether it is in the package.
        usual: How it is usually called, if it has a short name.
    """

    name: str
    location: str
    bundled: bool = False
    usual: Usual | None = None


def find(name: str) -> Source:
    """Return where a model of this name comes from.

    Raises:
        ModelError: If it is no known name, no hub id and no folder in diffusers' format.
    """
    if name in zoo.NAMES:
        return Source(name, str(zoo.folder(name)), bundled=True, usual=BUNDLED.get(name))
    if name in HUB:
        return Source(name, HUB[name].repository, usual=HUB[name])
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ModelError(f"{name} is a file; needed the folder that `pipeline.save_pretrained` wrote")
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"{name} is a folder without model_index.json; needed one that `pipeline.save_pretrained` wrote"
            )
        return Source(folder.resolve().name, str(folder))
    if name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise ModelError(f"there is no folder {name}; needed one that `pipeline.save_pretrained` wrote")
    if name.count("/") == 1 and all(name.split("/")):
        return Source(name.rpartition("/")[2], name)
    known = sorted([*zoo.NAMES, *HUB])
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? Known" if close else "known"
    raise ModelError(
        f"unknown model {name!r}; {hint} are {', '.join(known)}, a hub id such as {HUB['dit'].repository}, "
        "or a folder in diffusers' format"
    )
