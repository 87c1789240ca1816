"""Where things lie in the storage path, and the keys of what is made: sha256 of the facts that it depends on.

jobs/BACKBONE/STAGE/KEY/    metrics.jsonl, resume/, last/, weights/ (its commit record says that the job is finished),
                            kept/, probabilities/, labels that it made or took
hashes/FINGERPRINT/         of a catalogue's training images
held-out/KEY/               which images of a catalogue without val were held out as val
pretrained/NETWORK/         ImageNet weights
features/KEY/SPLIT/         of a catalogue's images, by a frozen backbone
tune/JOB-KEY.json           settings that were tried
.leases/                    who is at work on which plan and job
PLAN/                       submission.csv, result.json, ensemble/, ...: what people open
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aliprod.errors import Refused

METRICS, RESUME, LAST, WEIGHTS, KEPT = "metrics.jsonl", "resume", "last", "weights", "kept"
HASHES, HELD_OUT, TUNE, FEATURES = "hashes", "held-out", "tune", "features"
OWN = (
    "jobs", HASHES, HELD_OUT, FEATURES, "pretrained", TUNE, "ray", "models", "catalogues", "mlartifacts", "mlflow.db",
)  # fmt: skip
PACE = "pace.json"  # beside the checkpoints: how far a job is, and how fast
MODEL = "model.safetensors"  # in a folder of weights
PREDICTIONS = "predictions.parquet"  # in an ensemble's folder


def canonical(facts: Any) -> str:
    """Plain JSON in one form: keys sorted, no white space, ASCII."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def key_of(facts: Any) -> str:
    """sha256 of facts in their canonical form, in hexadecimal."""
    return hashlib.sha256(canonical(facts).encode()).hexdigest()


def flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All that stands in a table and in those within it: of ``{"lr": {"heads": 0.1}}`` ``lr.heads`` and 0.1."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def cache() -> Path:
    """The folder on this machine's own disk: ``ALIPROD_CACHE``, else one of this user in the system's temp folder."""
    return Path(os.environ.get("ALIPROD_CACHE") or Path(tempfile.gettempdir()) / f"aliprod-cache-{os.getuid()}")


def check_cache(folder: Path) -> None:
    """Make the cache. Refused: somebody else owns it, and would choose what is trained on."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid not in (os.getuid(), 0):
        raise Refused("belongs to another user.", folder, "Name a folder of your own in ALIPROD_CACHE.")


def cache_room(folder: Path, used: Iterable[int]) -> int:
    """Bytes of pictures that the cache may still take: all but a tenth of its disk, and with those in ``used`` no more
    than ``ALIPROD_CACHE_GB``. Refused: that is no number."""
    disk, most = shutil.disk_usage(folder), os.environ.get("ALIPROD_CACHE_GB", "inf")
    try:
        limit = float(most) * 1e9 - sum(used)
        if math.isnan(limit):
            raise ValueError(most)
    except ValueError as error:
        raise Refused(f"is no number: {most!r}.", "ALIPROD_CACHE_GB", "Name gigabytes, such as 100.") from error
    return max(0, int(min(disk.free - disk.total // 10, limit)))


def job_place(name: str, key: str) -> str:
    """The folder of a job, BACKBONE/STAGE, below the storage path."""
    return f"jobs/{name}/{key}"


def newest_step(folder: Path) -> int | None:
    """The step of a job's newest resume checkpoint, whose bytes are not looked at; None where there is none."""
    steps = (path for path in (folder / RESUME).glob("step-*") if path.suffix != ".bad")
    return max(map(step_of, steps), default=None)


def step_of(checkpoint: Path) -> int:
    """The step that a resume checkpoint was written after."""
    return int(checkpoint.name.removeprefix("step-"))
