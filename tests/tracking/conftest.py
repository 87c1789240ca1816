"""Finished jobs on disk, as training leaves them, and an MLflow without a server."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from aliprod.plan.jobs import Job
from aliprod.recipe import Stage
from aliprod.store import commit
from aliprod.tracking.runs import JobProgress, PlanProgress
from aliprod.tracking.sync import Tracking


@dataclass
class Place:
    """A storage path with an mlflow.db, and a driver's connection to it for the asking."""

    storage: Path
    lines: list[str]

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.storage}/mlflow.db"

    def driver(self) -> Tracking:
        tracking = Tracking(self.uri, "shop", self.storage / "mlartifacts", self.lines.append)
        self.show(tracking)
        return tracking

    def show(self, tracking: Tracking, *jobs: JobProgress, **changes: Any) -> None:
        """What a driver shows of a running plan with these jobs."""
        table = "| job | state |\n|---|---|\n"
        tracking.show(replace(PlanProgress('name = "shop"\n', "0" * 64, "RUNNING", table, jobs), **changes))

    def metrics(self, *records: dict[str, float]) -> Path:
        """A job's folder with epochs that its training has written."""
        (self.storage / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return self.storage


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database after its migrations, which take seconds: copied into each test."""
    folder = tmp_path_factory.mktemp("migrated")
    Tracking(f"sqlite:///{folder}/mlflow.db", "other", folder / "mlartifacts")
    return folder / "mlflow.db"


@pytest.fixture
def place(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the address that is given counts, no other
    (tmp_path / "mlflow.db").write_bytes(migrated.read_bytes())
    return Place(tmp_path, [])


@pytest.fixture
def job() -> Callable[..., Job]:
    """Makes a job of a plan; its key follows from the given digit."""

    def make(name: str = "resnet50/full", digit: str = "a", epochs: int = 3) -> Job:
        backbone, stage = name.split("/")
        stages = Stage(epochs=epochs)
        return Job(name, backbone, "resnet50.tv_in1k", stage, stages, (), None, (), (), True, {"digit": digit})

    return make


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Path]:
    """Writes what a finished job leaves: metrics.jsonl, weights/ and, where the last epoch is not the best, last/."""

    def write(job: Job, errors: tuple[float, ...] = (0.5, 0.2, 0.3), content: str = "") -> Path:
        folder = tmp_path / "jobs" / job.backbone / job.stage_name / job.key
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {"epoch": e, "time_ms": 1_700_000_000_000 + 60_000 * e, "train/class": 2.0 - e, "val/top1_error": error}
            for e, error in enumerate(errors)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        best = min(range(len(errors)), key=lambda e: errors[e])
        for name, epoch in {"weights": best, "last": len(errors) - 1}.items():
            if name == "weights" or epoch != best:
                commit.write(folder / name, _weights(f"{job.key} {epoch} {content}", epoch, errors[epoch]), {"n": 1})
        return folder

    return write


def _weights(content: str, epoch: int, error: float) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "model.safetensors").write_text(content)
        (folder / "config.json").write_text(json.dumps({"epoch": epoch, "top1_error": error}))
        (folder / "classes.json").write_text(json.dumps({"ids": [7, 9], "names": ["", ""]}))

    return fill
