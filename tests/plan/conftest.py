"""A small plan that says a little of everything, and a way to load any text as a plan."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from aliprod.plan.load import load
from aliprod.plan.schema import Plan

SMALL = """\
format = 1
name = "small"
seed = 7

[catalogue]
path = "pictures"

[backbones]
resnet = "resnet50.tv_in1k"
net-b3 = "efficientnet_b3.ra2_in1k"

[defaults]
shares = 2
resize = 64
crop = 64
pretrained = true
lr = { backbone = 0.01, heads = 0.1 }
optimizer = { momentum = 0.8 }
objective = { name = "cross_entropy", smoothing = 0.1 }

[stages.full]
epochs = 2

[stages.dcl]
start = "full"
objective = { name = "dcl", parts = 2 }
images = { per_class = 30 }
lr = { backbone = 0.001 }
seed = 3

[overrides.net-b3]
lr = { heads = 0.5 }

[overrides."net-b3/dcl"]
epochs = 4
lr = { heads = 0.25 }

[jobs]
resnet = ["dcl", "full"]
net-b3 = ["full", "dcl"]

[ensemble]
members = [
    "resnet/full",
    "net-b3/dcl",
]

[cluster]
storage = "results"
ranks = 2
"""


@pytest.fixture
def small() -> str:
    return SMALL


@pytest.fixture
def load_text(tmp_path: Path) -> Callable[..., Plan]:
    """Load a text as tmp_path/plan.toml."""

    def loaded(text: str, sets: Sequence[str] = ()) -> Plan:
        file = tmp_path / "plan.toml"
        file.write_text(text, encoding="utf-8")
        return load(file, sets)

    return loaded
