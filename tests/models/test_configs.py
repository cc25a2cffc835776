import json
import shutil
from pathlib import Path

import pytest

from dicache.models.configs import NAMES, read_config
from dicache.models.names import HUB, ModelError
from tests.models.folders import folder


def test_the_configurations_in_the_package_agree_with_what_is_known_of_the_models() -> None:
    assert set(NAMES) == {"dit", "dit-512", "flux", "pixart", "pixart-lcm", "sd15", "sd3", "sdxl"}
    for name in set(NAMES) & set(HUB):
        usual = read_config(name).usual
        assert (usual["steps"], usual["guidance"]) == (HUB[name].steps, HUB[name].guidance)
        assert HUB[name].size in (None, usual["height"])
        assert usual["height"] == usual["width"] == 8 * read_config(name).config.get("sample_size", 128)
        text = json.loads((Path(__file__).parents[2] / "dicache/models/configs" / f"{name}.json").read_text())
        assert text["repository"] == HUB[name].repository


def test_a_bundled_model_is_called_as_its_pipeline_is_by_default() -> None:
    digits = read_config("digits")
    assert digits.kind == "DiTTransformer2DModel"
    assert digits.usual == {"steps": 50, "guidance": 4.0, "text_tokens": None, "height": 32, "width": 32}
    assert digits.pixels_per_latent == 4


@pytest.mark.parametrize(("kind", "tokens"), [("dit", None), ("pixart", 120), ("sd3", 256 + 77), ("flux", 512)])
def test_the_text_tokens_of_a_folder_are_its_pipelines(kind: str, tokens: int | None) -> None:
    found = read_config(str(folder(kind)))
    assert found.usual["text_tokens"] == tokens
    assert found.pixels_per_latent == 2


def test_what_is_no_pipeline_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="configuration of ltx is not in the package; needed one of dit, dit-512"):
        read_config("ltx")
    with pytest.raises(ModelError, match="did you mean digits"):
        read_config("digit")
    broken = shutil.copytree(folder("dit"), tmp_path / "broken")
    (broken / "transformer" / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="is no configuration of a model of diffusers"):
        read_config(str(broken))
    shutil.rmtree(broken / "transformer")
    with pytest.raises(ModelError, match=r"neither transformer/config.json nor unet/config.json"):
        read_config(str(broken))
