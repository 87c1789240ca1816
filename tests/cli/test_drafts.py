"""From photographs to a plan: init writes it, measures and forecasts; run takes photographs too."""

import shutil
from pathlib import Path

import pytest
from PIL import Image
from shop import aliprod, answer, refusal

from aliprod.build.events import Ended
from aliprod.cluster import driver
from aliprod.plan.load import load


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("aliprod.cli.data._HUB", ("127.0.0.1", 9))  # nobody answers: no test needs a network
    monkeypatch.setattr("aliprod.cli.data._STEPS", 1)


def test_init_writes_a_plan_and_says_what_it_will_take(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        for name in ("a", "b"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.effect_noise((32, 32), 20).save(tmp_path / "photos" / split / name / f"{number}.png")
    told = answer("init", "photos", "--out", "mine.toml", "--storage", "runs")
    assert (told["plan"], told["path"]) == ("mine", "mine.toml")
    assert (told["classes"], told["train"]) == (2, 12)
    plan = load(tmp_path / "mine.toml")
    assert plan.catalogue.path == str(tmp_path / "photos")
    assert {job["name"] for job in told["estimate"]["jobs"]} == set(plan.job_names())
    assert told["estimate"]["seconds"] > 0


def test_init_writes_over_nothing_and_refuses_what_is_no_catalogue(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("# changed by hand\n")
    assert "is there already" in refusal(2, "init", photos, "--out", "mine.toml")
    assert (tmp_path / "mine.toml").read_text() == "# changed by hand\n"
    (tmp_path / "empty").mkdir()
    assert "holds no catalogue" in refusal(2, "init", "empty")
    assert "cannot be written" in refusal(2, "init", photos, "--out", "no/such/folder.toml")


def test_run_takes_photographs_and_goes_on_with_their_plan(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    outcome = {"trained": [], "reused": [], "failed": [], "ensemble": None}
    monkeypatch.setattr(driver, "run", lambda request, whole: ran.append(request) or iter([Ended(outcome)]))
    for _ in range(2):
        result = aliprod("run", photos)
        assert result.exit_code == 0, result.output
    (plan,) = tmp_path.glob("*.toml")
    assert [request.plan for request in ran] == [load(plan)] * 2
    assert "it goes on" in result.output
    assert "it goes on" in aliprod("run", f"{photos}/../{photos.name}").output
    other = shutil.copytree(photos, tmp_path / "other" / photos.name)
    assert f"is the plan of {photos}, not of {other}." in refusal(2, "run", other)
    assert len(ran) == 3
