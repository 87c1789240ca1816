"""A plan whose storage is a bucket, on two machines that share nothing: killed, taken up, the bytes of a folder."""

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from aliprod.store import commit, mirror
from aliprod.store.layout import RESUME, WEIGHTS
from tests.conftest import make_all, open_file, s3_environment

JOBS = ("efficientnet/full", "resnet/full")
SETS = (
    'jobs={efficientnet=["full"], resnet=["full"]}',
    f"ensemble.members={json.dumps(JOBS)}",
    "stages.full.epochs=6",
    "cluster.save_every_steps=16",
)


@pytest.fixture
def two(s3: str, heads: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A cluster of two machines with a CPU each, so that each has a job; the second has a cache of its own."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("needs the right to make a mount namespace (unshare --mount, as root)")
    for name, value in s3_environment(s3).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ALIPROD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    with ExitStack() as stack:
        cluster = stack.enter_context(heads(1))
        stack.enter_context(cluster.node("--num-cpus=1", mount=f"mount -t tmpfs tmpfs {tmp_path / 'cache'}"))
        cluster.environment["ALIPROD_CACHE"] = str(tmp_path / "cache")
        yield cluster


@pytest.mark.usefixtures("torch_as_before")
def test_a_plan_in_a_bucket_is_killed_and_taken_up_by_another_machine_to_the_bytes_of_a_folder(
    two: Any, plan: Path, tmp_path: Path
) -> None:
    arguments: tuple[str | Path, ...] = ("run", plan, "--storage", "s3://team/killed", "--json")
    arguments += tuple(word for text in SETS for word in ("--set", text))
    expected = open_file(plan, tmp_path / "folder", SETS)
    make_all(expected)

    first = two.start(*arguments)
    mirrored = mirror.place("s3://team/killed")
    assert mirrored is not None
    two.until(lambda: any(_resumes(mirrored, name) for name in JOBS), first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    two.until(lambda: not two.workers())  # which still write
    shutil.rmtree(tmp_path / "cache" / mirrored.relative_to(tmp_path / "cache").parts[0])

    ended = two.aliprod(*arguments)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    outcome = json.loads(ended.stdout.splitlines()[-1])
    assert sorted(outcome["trained"] + outcome["reused"]) == sorted(JOBS)
    assert outcome["trained"], "it was killed in the middle"
    assert outcome["ensemble"]["submission"] == "s3://team/killed/tiny/submission.csv"

    shutil.rmtree(tmp_path / "cache" / mirrored.relative_to(tmp_path / "cache").parts[0])  # whoever looks now
    found = open_file(plan, Path("s3://team/killed"), SETS)
    assert found.places.storage == mirrored
    for name in JOBS:
        folders = [one.job_folder(name) / WEIGHTS for one in (expected, found)]
        assert commit.fetch(folders[1]) is not None
        assert commit.verify(folders[1]) == []
        assert commit.digests(folders[0])["model.safetensors"] == commit.digests(folders[1])["model.safetensors"]
        assert _epochs(folders[0].parent) == _epochs(folders[1].parent)
        assert not _resumes(mirrored, name)
    commit.fetch(found.folder / "ensemble")
    for file in ("submission.csv", "predictions.parquet"):
        assert (found.folder / "ensemble" / file).read_bytes() == (expected.folder / "ensemble" / file).read_bytes()
    left = [name for name in _objects(mirrored) if ".partial" in name or ".unfinished" in name]
    assert left == []


def _objects(mirrored: Path) -> list[str]:
    there = mirror.of(mirrored)
    assert there is not None
    return list(there.bucket.list(there.key(mirrored)))


def _resumes(mirrored: Path, job: str) -> bool:
    return any(f"jobs/{job}/" in name and f"/{RESUME}/step-" in name for name in _objects(mirrored))


def _epochs(folder: Path) -> list[Mapping[str, Any]]:
    """The lines of a training, but for when and how fast."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(("speed/", "time_"))} for line in lines]
