"""What `--model` takes: a bundled model, a short name, a hub id, or a folder in diffusers' format."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from dicache.models import zoo

# Short name -> hub id of a repository in diffusers' format.
HUB = {
    "cogvideox": "zai-org/CogVideoX-5b",
    "dit": "facebook/DiT-XL-2-256",
    "dit-512": "facebook/DiT-XL-2-512",
    "flux": "black-forest-labs/FLUX.1-dev",
    "hunyuanvideo": "hunyuanvideo-community/HunyuanVideo",
    "latte": "maxin-cn/Latte-1",
    "ltx": "Lightricks/LTX-Video",
    "lumina2": "Alpha-VLLM/Lumina-Image-2.0",
    "pixart": "PixArt-alpha/PixArt-XL-2-1024-MS",
    "pixart-sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "qwen-image": "Qwen/Qwen-Image",
    "sana": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5": "stabilityai/stable-diffusion-3.5-large",
    "wan": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
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
    """

    name: str
    location: str
    bundled: bool = False


def find(name: str) -> Source:
    """Return where a model of this name comes from.

    Raises:
        ModelError: If it is no known name, no hub id and no folder in diffusers' format.
    """
    if name in zoo.NAMES:
        return Source(name, str(zoo.folder(name)), bundled=True)
    if name in HUB:
        return Source(name, HUB[name])
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"{name} is a folder without model_index.json; needed one that `pipeline.save_pretrained` wrote"
            )
        return Source(folder.resolve().name, str(folder))
    if name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~")):
        return Source(name.rpartition("/")[2], name)
    known = sorted([*zoo.NAMES, *HUB])
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ModelError(
        f"unknown model {name!r}; {hint}Known are {', '.join(known)}, a hub id such as {HUB['dit']}, "
        "or a folder in diffusers' format"
    )
