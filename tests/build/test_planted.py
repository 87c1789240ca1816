"""Whoever may write into the storage path may not run code as whoever reads it: pickles in the place of every file."""

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from aliprod.build.graph import targets
from aliprod.build.target import Site
from aliprod.catalogue import sources
from aliprod.cli import app
from aliprod.errors import AliprodError
from aliprod.ingest.prepare import Settings, prepare
from aliprod.models.classifier import Classifier
from aliprod.models.weights import load_pretrained
from aliprod.plan.open import Opened
from aliprod.store import commit
from tests.build.test_products import shop
from tests.conftest import make_all

__all__ = ["shop"]
pytestmark = pytest.mark.usefixtures("torch_as_before")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.canary),)


def payload(suffix: str, canary: Path) -> bytes:
    """What runs code in the reader of such a file that reads pickles."""
    out = io.BytesIO()
    if suffix == ".npy":
        np.save(out, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    elif suffix == ".safetensors":
        torch.save({"weight": Payload(canary)}, out)
    else:
        pickle.dump(Payload(canary), out)
    return out.getvalue()


def plant(file: Path, canary: Path) -> None:
    """Put a payload in the place of a file, and its checksum into the manifest: whoever writes there can."""
    file.write_bytes(payload(file.suffix, canary))
    manifest = file.parent / commit.MANIFEST
    if manifest.exists() and manifest != file:
        said = json.loads(manifest.read_text())
        said["files"][file.name] = {"bytes": file.stat().st_size, "sha256": commit.sha256(file)}
        said.pop("sha256")
        manifest.write_text(json.dumps(said | {"sha256": commit._seal(said)}))


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "a pickle was read"


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(payload(".json", tmp_path / "one"))
    np.load(io.BytesIO(payload(".npy", tmp_path / "two")), allow_pickle=True)
    torch.load(io.BytesIO(payload(".safetensors", tmp_path / "three")), weights_only=False)
    assert len(list(tmp_path.iterdir())) == 3


def test_no_line_of_the_package_asks_for_a_pickle() -> None:
    """Of places that the tests below know nothing of, too."""
    asks = re.compile(
        r"(pickle|dill|joblib|marshal|shelve)\.(loads?|open|Unpickler)\b|torch\.load\(|allow_pickle=True"
        r"|weights_only=False|yaml\.(load|unsafe_load)\(|trust_remote_code"
    )
    package = Path(__file__).parents[2] / "aliprod"
    lines = [f"{path.name}: {line}" for path in package.rglob("*.py") for line in path.read_text().splitlines()]
    assert len(lines) > 1000
    assert list(filter(asks.search, lines)) == []


@pytest.fixture(scope="module")
def finished(shop: Opened) -> Opened:
    """All targets of a plan, one of every kind, and a job with checkpoints."""
    make_all(shop)
    job = targets(shop, gpu=False)["net/filtered"]
    kept = job.folder(shop.places.storage)
    aside = kept.with_name("aside")
    kept.rename(aside)
    steps = iter([False] * 2 + [True] * 99)
    job.make(job, replace(Site.of(shop), stop=lambda: next(steps)))
    aside.rename(kept)
    return shop


def test_no_file_that_a_target_reads_of_another_is_unpickled(finished: Opened, tmp_path: Path, canary: Path) -> None:
    storage = finished.places.storage
    graph, tried = targets(finished, gpu=False), set[str]()
    for target in graph.values():
        readers = [one for one in graph.values() if target in one.needed()]
        for file in sorted(target.folder(storage).iterdir()):
            case = f"{target.kind} {[one.kind for one in readers]} {file.name}"
            if case in tried or not readers:
                continue
            tried.add(case)
            copy = tmp_path / "storage"
            shutil.copytree(storage, copy)
            plant(target.folder(copy) / file.name, canary)
            for reader in readers:
                shutil.rmtree(reader.folder(copy))
                with suppress(Exception):  # a sentence where it can be told; what matters here is that nothing runs
                    reader.make(reader, replace(Site.of(finished), storage=copy))
                assert not canary.exists(), f"{case} is unpickled by {reader.name}"
            shutil.rmtree(copy)
    assert {case.split()[0] for case in tried} >= {
        *("training", "hashes", "kept_rows", "soft_labels", "pseudo_labels", "prediction", "ensemble")
    }


def test_no_checkpoint_is_unpickled(finished: Opened, tmp_path: Path, canary: Path) -> None:
    job = targets(finished, gpu=False)["net/filtered"]
    [*_, newest] = sorted(job.folder(finished.places.storage).parent.glob("resume/step-*"))
    for name in sorted(path.name for path in newest.iterdir()):
        copy = tmp_path / "storage"
        shutil.copytree(finished.places.storage, copy)
        shutil.rmtree(job.folder(copy))
        for step in job.folder(copy).parent.glob("resume/step-*"):
            plant(step / name, canary)
        with suppress(Exception):
            job.make(job, replace(Site.of(finished), storage=copy))
        assert not canary.exists(), name
        shutil.rmtree(copy)


def test_no_command_unpickles_what_lies_in_the_folders_of_plans_and_jobs(
    finished: Opened, tmp_path: Path, canary: Path
) -> None:
    plan = finished.places.storage.parent / "plan.toml"
    storage = tmp_path / "storage"
    shutil.copytree(finished.places.storage, storage)
    commands = [
        ["plan", plan],
        ["status", plan],
        ["report", plan],
        ["predict", plan, finished.read_catalogue().root / "val"],
        ["export", plan, tmp_path / "out", "--images", finished.read_catalogue().root / "val"],
        ["data", "check", plan],
    ]
    names = ["state.json", "result.json", "members.json", "forecast.json", "benchmark.json", "comparison.json"]
    for folder in [storage / "shop", *storage.glob("jobs/*/*/*"), *storage.glob("shop/*/"), *storage.glob("*/*/")]:
        for name in (*names, "metrics.jsonl", "tuner.pkl", "searcher-state-0.pkl"):
            if folder.is_dir():
                (folder / name).write_bytes(payload(".json", canary))
    for folder in (storage / "ray" / "tune.net.full", storage / "tune", storage / "ray"):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("tuner.pkl", "trainer.pkl", "trainable.pkl", ".validate_storage_marker", "net.json"):
            (folder / name).write_bytes(payload(".json", canary))
    for file in storage.rglob("*"):
        if file.is_file() and file.name not in (*names, commit.MANIFEST):
            plant(file, canary)
    for command in commands:
        result = CliRunner().invoke(app, [*map(str, command), "--storage", str(storage)])
        assert not canary.exists(), command
        assert result.exception is None or isinstance(result.exception, SystemExit), (command, result.exception)
    for weights in storage.glob("jobs/*/*/*/weights"):
        result = CliRunner().invoke(app, ["predict", str(weights), str(finished.read_catalogue().root / "val")])
        assert result.exit_code == 2, result.output


def read_whole(folder: Path) -> None:
    for images in sources.read(folder).splits:
        for row in range(len(images)):
            images.source(row)


def test_neither_pretrained_weights_nor_a_prepared_catalogue_is_unpickled(
    finished: Opened, tmp_path: Path, canary: Path
) -> None:
    file = tmp_path / "net.safetensors"
    file.write_bytes(payload(".safetensors", canary))
    with pytest.raises(AliprodError):
        load_pretrained(Classifier("test_resnet.r160_in1k", 3), file)
    for _ in prepare(finished.read_catalogue().root, tmp_path / "prepared", Settings()):
        pass
    for name in sorted(path.name for path in (tmp_path / "prepared").iterdir()):
        shutil.copytree(tmp_path / "prepared", tmp_path / "copy")
        plant(tmp_path / "copy" / name, canary)
        with pytest.raises(AliprodError):
            read_whole(tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy")
