"""What a submission was made of, kept for each one that was ever written, whatever became of the file.

STORAGE/PLAN/submissions/SHA256.json     named after the submission's bytes, so that a copy of it finds it too
"""

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from aliprod.errors import Refused, near_file
from aliprod.shown import redacted
from aliprod.store import commit
from aliprod.store.layout import LAST, MODEL, WEIGHTS, job_place
from aliprod.version import VERSION

_FOLDER = "submissions"
COMPARISON = "comparison.json"
MEMBERS = "members.json"  # in a plan's folder: the checkpoints that its ensemble was last made of, by job


@cache
def revision() -> str:
    """The git commit of aliprod, where its sources are a checkout; else ''."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or not shutil.which("git"):
        return ""
    asked = ("git", "-C", root, "rev-parse", "HEAD")
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def software() -> str:
    """The version of aliprod, and its `revision`."""
    return f"{VERSION} {revision()}".strip()


@dataclass(frozen=True)
class Voice:
    """A member of an ensemble: its weights folder, what it counts, its temperature (None: as it is), and its version in
    MLflow, where it was asked for by that."""

    folder: Path
    weight: float = 1.0
    temperature: float | None = None
    version: int | None = None


def voices(storage: Path, plan: str) -> list[Voice]:
    """What a plan's ensemble was last made of; [] where any of it is missing."""
    record = commit.read(storage / plan / "ensemble")
    said = None if record is None else {one["job"]: one for one in record["members"]}
    found = []
    for name, choice in commit.read_json(storage / plan / MEMBERS).items():
        own = {"weight": 1} if said is None else said.get(name)  # one of weight 0 is not in the record
        if own is not None:
            folder = weights_folder(storage, plan, name, choice["key"], choice["sha256"])
            found.append(Voice(folder, own["weight"], own.get("temperature")))
    return found if all(commit.read(one.folder) is not None for one in found) else []


def comparison(storage: Path, plan: str) -> dict[str, Any] | None:
    """What a plan's ensemble was found to be worth, as `aliprod.ensemble.compare` tells it; None where that is not
    known."""
    return commit.read_json(storage / plan / "comparison" / COMPARISON) or None


def weights_folder(storage: Path, plan: str, job: str, key: str, sha256: str) -> Path:
    """Where weights of a job lie or, where MLflow alone has them, where they are to be brought."""
    for kind in (WEIGHTS, LAST):
        folder = storage / job_place(job, key) / kind
        if commit.read(folder) is not None and commit.digests(folder)[MODEL] == sha256:
            return folder
    return storage / plan / "chosen" / sha256[:16]


def keep(submission: Path, origin: Mapping[str, Any]) -> None:
    """Write down what a submission in a plan's folder was made of, without the passwords in addresses. StorageFull: no
    room, no right to write, or the path is gone."""
    record = submission.parent / _FOLDER / f"{commit.sha256(submission)}.json"
    commit.write_file(record, redacted(json.dumps(origin, indent=1)))


def find(submission: Path, storage: Path) -> dict[str, Any]:
    """What a submission was made of, whichever plan of a storage folder wrote it. Refused: it cannot be read, or none
    of the plans wrote these bytes."""
    try:
        digest = commit.sha256(submission)
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror or error}.", submission, near_file(submission)) from None
    own = submission.absolute().parent / _FOLDER  # plans that share their jobs write the same bytes
    for record in sorted(storage.glob(f"*/{_FOLDER}/{digest}.json"), key=lambda file: (file.parent != own, file)):
        return dict(json.loads(redacted(record.read_text(encoding="utf-8"))))
    known = sum(1 for _ in storage.glob(f"*/{_FOLDER}/*.json"))
    advice = f"{known} are known there. Was it changed after it was written? Is it another --storage?"
    raise Refused(f"no plan in {storage} has written these bytes.", submission, advice)
