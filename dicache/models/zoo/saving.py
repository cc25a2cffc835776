"""Write a trained pipeline as a folder that loads offline under any version of transformers."""

import json
from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from dicache.models.sampling import PROMPTS_FILE

# Of transformers 4 the slow tokenizers need sentencepiece, or files that version 5 does not write.
FAST = {"T5Tokenizer": "T5TokenizerFast", "CLIPTokenizer": "CLIPTokenizerFast"}


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, prompts: Sequence[str]) -> None:
    """Write a pipeline in diffusers' format, in half precision but for the text encoders, and its prompts.

    Transformers keeps the precision of the file and diffusers does not, so that a text encoder in half precision could
    not be loaded beside the others without naming one.
    """
    for name, part in pipeline.components.items():
        if name in ("vae", "transformer"):
            part.half()
        elif name.startswith("text_encoder"):
            part.float()
    pipeline.save_pretrained(folder, safe_serialization=True)
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    for part in content.values():
        if isinstance(part, list) and part[1] in FAST:
            part[1] = FAST[part[1]]
    index.write_text(json.dumps(content, indent=2) + "\n")
    for settings in folder.glob("tokenizer*/tokenizer_config.json"):
        written = json.loads(settings.read_text())
        if written.get("extra_special_tokens") == []:  # version 4 takes a mapping only
            del written["extra_special_tokens"]
        settings.write_text(json.dumps(written, indent=2) + "\n")
    for name, part in pipeline.components.items():
        if isinstance(part, CLIPTextModel):
            _name_as_in_version_4(folder / name / "model.safetensors")
    (folder / PROMPTS_FILE).write_text("\n".join(prompts) + "\n")


def _name_as_in_version_4(file: Path) -> None:
    """Give the weights of CLIP's text encoder the names of the files on the hub, which all versions read."""
    weights = load_file(file)
    renamed = {name if name.startswith("text_model.") else f"text_model.{name}": w for name, w in weights.items()}
    save_file(renamed, file, metadata={"format": "pt"})
