import json
from pathlib import Path

from click.testing import CliRunner

from dicache.cli import main


def test_the_demo_leaves_profile_schedules_table_and_pictures(tmp_path: Path) -> None:
    words = ["demo", "--runs", "2", "--steps", "6", "--images", "1", "--json", "-o", str(tmp_path)]
    result = CliRunner().invoke(main, words, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"digits", "scenes", "results.txt"}
    pictures = {"delta.png", "similarity.png", "teacache.png", "schedules.png", "images.png"}
    schedules = {"fora-2.json", "fora-3.json", "teacache-1.5x.json", "teacache-2x.json"}
    for model in ("digits", "scenes"):
        names = {path.name for path in (tmp_path / model).iterdir()}
        assert names == {"profile.h5", *pictures, *schedules}
    table = (tmp_path / "results.txt").read_text()
    assert "digits, 6 steps, guidance 4, 1 image" in table
    assert "scenes, 6 steps, guidance 4.5, 1 image" in table
    assert all(part in result.stderr for part in table.strip().split("\n\n"))
    told = json.loads(result.stdout)["results"]
    assert [row["schedule"] for row in told["scenes"]][:3] == ["uncached", "fora-2", "fora-3"]
    for row in ("uncached", "fora-2", "fora-3", "teacache-1.5x", "teacache-2x"):
        assert table.count(f"\n{row} ") == 2
