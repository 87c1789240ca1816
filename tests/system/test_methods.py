"""Jobs that learn from other jobs, on a real Ray; `tests/build/test_products.py` looks at what each of them makes."""

import json
from pathlib import Path
from typing import Any

from aliprod.store import commit

PLAN = """\
format = 1
name = "methods"

[catalogue]
path = "catalogue"

[backbones]
net = "test_efficientnet.r160_in1k"

[defaults]
resize = 72
crop = 64
augmentation = ["random_crop", "flip"]
batch_size = 8

[stages.full]

[stages.labelled]
start = "full"
duplicates = "drop"
pseudo_labels = { by = ["net/full"], threshold = 0.3, per_class = 2 }

[stages.student]
start = "full"
objective = { name = "distillation", temperature = 2.0 }
teachers = ["net/full"]

[stages.soup]
soup = { of = ["labelled", "student"] }

[jobs]
net = ["full", "labelled", "student", "soup"]

[ensemble]
members = ["net/full", "net/soup"]
score = "val"

[cluster]
use_gpu = false
poll_seconds = 0.2
"""
JOBS = {"net/full", "net/labelled", "net/student", "net/soup"}


def test_every_method_is_a_job_of_the_graph(cluster: Any, plan: Path, tmp_path: Path) -> None:
    (tmp_path / "catalogue").symlink_to(plan.parent / "catalogue")
    (tmp_path / "methods.toml").write_text(PLAN)
    ran = cluster.aliprod("run", tmp_path / "methods.toml", "--storage", tmp_path / "storage", "--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    outcome = json.loads(ran.stdout.splitlines()[-1])
    assert set(outcome["trained"]) == JOBS
    assert outcome["ensemble"]["split"] == "val"
    made = {folder.name for folder in tmp_path.glob("storage/jobs/*/*/*/*") if commit.read(folder) is not None}
    assert made >= {"weights", "kept", "pseudo_labels"}
