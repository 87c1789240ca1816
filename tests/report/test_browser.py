"""The report in a real browser: nothing scrolls sideways on a phone, and the plan is printed."""

import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from aliprod.catalogue.catalogue import Catalogue
from aliprod.plan.load import load
from aliprod.plan.open import Request
from aliprod.plan.places import resolve
from aliprod.report import page

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import screenshots

sys.path.pop(0)

pytestmark = pytest.mark.skipif(screenshots.browser() is None, reason="no chromium here: apt-get install chromium")

NETWORK = "a-network-with-a-name-of-forty-letters-x"
PLAN = f"""\
format = 1
name = "{"shop" * 12}"
catalogue = {{ path = "pictures" }}
backbones = {{ {NETWORK} = "resnet18.a1_in1k" }}
stages = {{ full = {{ epochs = 2 }}, accuracy = {{ start = "full", epochs = 2 }} }}
jobs = {{ {NETWORK} = ["full", "accuracy"] }}
ensemble = {{ members = ["{NETWORK}/full", "{NETWORK}/accuracy"] }}
"""


@pytest.fixture
def report(packages: Catalogue, tmp_path: Path) -> Path:
    shutil.copytree(packages.root, tmp_path / "pictures")
    (tmp_path / "plan.toml").write_text(PLAN)
    plan = load(tmp_path / "plan.toml")
    return page.write(Request(plan, PLAN, resolve(plan, tmp_path / "runs", None, None)))


def test_nothing_scrolls_sideways_on_a_phone_and_each_look_is_drawn(report: Path, tmp_path: Path) -> None:
    assert screenshots.size(report, screenshots.PHONE)[0] == screenshots.PHONE
    files = {path.name: path for path in screenshots.shoot(report, tmp_path / "shots")}
    assert files["paper.pdf"].read_bytes().startswith(b"%PDF")
    light, dark = (Image.open(files[name]).convert("L").getpixel((2, 2)) for name in ("phone.png", "dark.png"))
    assert light > 240
    assert dark < 40
