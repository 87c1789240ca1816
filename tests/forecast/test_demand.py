"""demand: what a plan takes of the disk, counted beforehand, is what lies there afterwards."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aliprod.build.graph import targets
from aliprod.build.target import Site, lacking
from aliprod.catalogue import sources
from aliprod.forecast.demand import demand
from aliprod.plan.jobs import jobs_of
from aliprod.plan.load import load
from aliprod.plan.open import Opened
from aliprod.plan.places import resolve
from aliprod.synth.synth import synthesise

pytestmark = pytest.mark.usefixtures("torch_as_before")
PLAN = """\
format = 1
name = "shop"
catalogue = { path = "photos" }
backbones = { net = "test_resnet.r160_in1k", other = "test_vit" }
defaults = { resize = 40, crop = 32, batch_size = 32, augmentation = ["random_crop", "flip"], ema = 0.9 }
[stages]
full = {}
student = { start = "full", objective = "distillation", teachers = ["other/full"] }
[jobs]
net = ["full", "student"]
other = ["full"]
[ensemble]
members = ["net/student", "other/full"]
views = "center"
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("shop")
    synthesise(folder / "photos", classes=20, images=100, seed=0)
    (folder / "plan.toml").write_text(PLAN)
    plan = load(folder / "plan.toml")
    catalogue = sources.read(folder / "photos")
    places = resolve(plan, folder / "runs", "http://127.0.0.1:9", None)  # MLflow's copies of weights lie there
    return Opened(plan, PLAN, places, catalogue, jobs_of(plan, catalogue.fingerprint))


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_folder_of_a_run_is_as_large_as_was_said(shop: Opened) -> None:
    said = demand(shop)
    site, storage, resume = Site.of(shop), shop.places.storage, dict[str, int]()
    while todo := lacking(targets(shop, False), storage):
        target = next(t for t in todo.values() if not any(need.name in todo for need in t.needed()))
        if target.kind == "training" and target.name not in resume:
            target.make(target, replace(site, stop=lambda: True))  # it ends early, with a checkpoint
            resume[target.name] = on_disk(target.folder(storage).parent / "resume")
            continue
        target.make(target, site)
    assert sum(said.kept.values()) == pytest.approx(on_disk(storage), rel=0.05)
    for name in shop.jobs:
        assert said.kept[name] == pytest.approx(on_disk(shop.job_folder(name)), rel=0.05), name
        # the first checkpoint, before any epoch has ended: without the best weights so far
        assert said.resume[name] * 3 / 4 == pytest.approx(2 * resume[name], rel=0.05), name
    arrays = [file.stat().st_size for file in storage.glob("jobs/other/full/*/probabilities/*/probabilities-*.npy")]
    assert sum(arrays) == pytest.approx(2 * len(shop.read_catalogue().test) * 20, rel=0.05)
    assert sum(demand(shop).kept.values()) == 0


def test_weights_count_twice_where_mlflow_keeps_its_copies_beside_them(shop: Opened, tmp_path: Path) -> None:
    here = resolve(shop.plan, tmp_path, None, None)
    apart = replace(here, tracking_uri="http://127.0.0.1:9")
    kept = [demand(replace(shop, places=places)).kept["net/full"] for places in (here, apart)]
    assert kept[0] == 2 * kept[1] > 0


def test_counting_imports_no_torch() -> None:
    code = "import sys; from aliprod.forecast import demand; sys.exit(bool({'torch', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
