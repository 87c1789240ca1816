"""A plan with its catalogue in a folder, and commands as a user types them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result

from aliprod.catalogue import sources
from aliprod.cli import app
from aliprod.models import weights
from aliprod.models.classifier import Classifier
from aliprod.plan.jobs import jobs_of
from aliprod.plan.load import load
from aliprod.store import commit
from aliprod.store.layout import job_place

PLAN = """\
format = 1
name = "shop"

[catalogue]
path = "photos"

[backbones]
net = "test_resnet.r160_in1k"

[defaults]
resize = 40
crop = 32

[stages.full]
epochs = 1

[stages.accuracy]
start = "full"
objective = "accuracy"

[jobs]
net = ["full", "accuracy"]

[ensemble]
members = ["net/accuracy"]
"""


@dataclass
class Shop:
    """A folder with a plan and its catalogue, in which the storage path is to be ``runs``."""

    folder: Path

    @property
    def plan(self) -> Path:
        return self.folder / "plan.toml"

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    def write(self, old: str = "", new: str = "") -> None:
        assert old in PLAN
        self.plan.write_text(PLAN.replace(old, new) if old else PLAN)

    def files(self) -> dict[str, bytes]:
        """All that lies in the storage path."""
        return {str(p.relative_to(self.storage)): p.read_bytes() for p in self.storage.rglob("*") if p.is_file()}

    def finish(self, name: str, error: float = 0.25) -> None:
        """Commit a job's weights, as its training would."""
        job = jobs_of(load(self.plan), sources.read(self.folder / "photos").fingerprint)[name]
        folder = self.storage / job_place(name, str(job.key)) / "weights"
        record = {"top1_error": error, "best_epoch": 0, "seconds": 1.0}
        record |= {"network": job.network, "stage": job.stage.model_dump(mode="json")}
        commit.write(folder, model, record)


def model(folder: Path, classes: int = 3) -> None:
    """A weights folder of a network that has learned nothing."""
    torch.manual_seed(0)
    network = Classifier("test_resnet.r160_in1k", classes)
    config = weights.Config(network.network, (0.5,) * 3, (0.25,) * 3, "bilinear", 40, 32)
    named = weights.Classes(tuple(range(10, 10 + classes)), tuple(f"name {number}" for number in range(classes)))
    weights.save(folder, network.state_dict(), config, named)


def aliprod(*arguments: str | Path) -> Result:
    """Run a command; whatever it is, it must not end in a traceback."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "Traceback" not in result.output
    return result


def answer(*arguments: str | Path, status: int = 0) -> dict[str, Any]:
    """The last line of standard output, which is JSON."""
    result = aliprod(*arguments, "--json")
    assert result.exit_code == status, result.output
    return dict(json.loads(result.stdout.splitlines()[-1]))


def refusal(status: int, *arguments: str | Path) -> str:
    """What a command says that does not do what it was asked for."""
    result = aliprod(*arguments)
    assert result.exit_code == status, result.output
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) <= 25, "one screen"
    return result.stderr
