"""Does a plan end with the same bytes, whatever is killed on its way?

A plan of three small jobs runs undisturbed; then with two drivers at once, on a Ray whose head has no CPUs and whose
other nodes are of two kinds. At random moments of its training a rank, a driver or a node is killed with SIGKILL;
another driver is started at once, another node, of either kind, comes a little later. A plan that has ended before
enough was killed is run again from nothing. Compared are all committed files; counted are MLflow's runs and versions
of each key, and the epochs that were told twice.

    python benchmarks/faults.py [--kills 50] [--seeds 3] [--pause 5]
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ratio import header
from ray.cluster_utils import Cluster

from aliprod.store import commit
from aliprod.synth.synth import synthesise

PLAN = """\
format = 1
name = "faults"
[catalogue]
path = "catalogue"
[backbones]
resnet = "test_resnet"
efficientnet = "test_efficientnet"
[defaults]
resize = 72
crop = 64
pretrained = false
augmentation = ["random_crop", "flip"]
batch_size = 16
shares = 2
epochs = 12
lr = { backbone = 0.02, heads = 0.02 }
[stages.full]
[stages.dcl]
start = "full"
objective = { name = "dcl", parts = 2 }
[jobs]
resnet = ["full", "dcl"]
efficientnet = ["full"]
[ensemble]
members = ["resnet/dcl", "efficientnet/full"]
[cluster]
use_gpu = false
cpus_per_worker = 1
save_every_steps = 4
max_failures = 1000
poll_seconds = 0.2
"""
KINDS = (1, 2)  # CPUs of a node
TICK_SECONDS = 0.5


def main() -> None:
    """Run the plan undisturbed once, then disturbed for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of a seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds of training between two, on average")
    asked = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
    print(header(("torch", "ray", "mlflow")), flush=True)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        synthesise(folder / "catalogue", classes=8, images=320, seed=0)
        (folder / "plan.toml").write_text(PLAN)
        with driver(folder, folder / "undisturbed") as alone:
            if alone.wait():
                sys.exit("the undisturbed plan failed")
        expected = made(folder / "undisturbed")
        wrong = [line for seed in range(asked.seeds) for line in disturbed(folder, seed, expected, asked)]
        sys.exit("\n".join(wrong) if wrong else 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def disturbed(folder: Path, seed: int, expected: dict[str, Any], asked: argparse.Namespace) -> Iterator[str]:
    """Kill what a seed says, and yield what is wrong in the end."""
    draw, killed, plans = random.Random(seed), Counter[str](), 0
    while killed.total() < asked.kills:
        scene = Scene(folder, folder / f"seed-{seed}-{plans}", draw)
        try:
            scene.play(asked.kills - killed.total(), asked.pause, killed)
        finally:
            scene.close()
        plans += 1
        found = made(scene.storage)
        names = sorted(found.keys() | expected)
        said = [f"OTHER BYTES: {name}" for name in names if found.get(name) != expected.get(name)]
        said += twice(scene.storage)
        yield from (f"seed {seed}: {line}" for line in said)
        print(f"  plan {plans} of seed {seed}: {', '.join(said) or 'same bytes, nothing twice'}", flush=True)
    told = ", ".join(f"{count} x {what}" for what, count in sorted(killed.items()))
    print(f"seed {seed}: killed {told}, in {plans} runs of the plan", flush=True)


@dataclass
class Scene:
    """A cluster, and two drivers of the plan in a storage path of its own."""

    folder: Path
    storage: Path
    draw: random.Random
    drivers: list["subprocess.Popen[str]"] = field(default_factory=list)
    coming: list[float] = field(default_factory=list)  # when the next nodes come

    def __post_init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for cpus in KINDS:
            self.cluster.add_node(num_cpus=cpus)
        self.drivers += [driver(self.folder, self.storage, self.cluster.address) for _ in range(2)]

    def play(self, kills: int, pause: float, killed: Counter[str]) -> None:
        """Kill up to so many until the plan has ended; what nothing trains in is no time."""
        left = self.draw.expovariate(1 / pause)
        while not all(one.poll() == 0 for one in self.drivers):
            time.sleep(TICK_SECONDS)
            self.drivers = [one if one.poll() in (None, 0) else self.another(one) for one in self.drivers]
            for moment in [moment for moment in self.coming if moment < time.monotonic()]:
                self.coming.remove(moment)
                self.cluster.add_node(wait=False, num_cpus=self.draw.choice(KINDS))
            left -= TICK_SECONDS if self.ranks() else 0.0
            if kills and left < 0 and (what := self.kill()):
                killed[what] += 1
                kills -= 1
                left = self.draw.expovariate(1 / pause)

    def ranks(self) -> list[psutil.Process]:
        """What trains."""
        return [process for process in psutil.Process().children(recursive=True) if is_rank(process)]

    def kill(self) -> str:
        """Kill something; what it was."""
        match self.draw.choice(("rank", "driver", "node")):
            case "rank" if ranks := self.ranks():
                self.draw.choice(ranks).kill()
                return "rank"
            case "driver" if alive := [one for one in self.drivers if one.poll() is None]:
                os.killpg(self.draw.choice(alive).pid, signal.SIGKILL)
                return "driver"
            case "node" if nodes := [one for one in self.cluster.worker_nodes if not one.head]:
                self.cluster.remove_node(self.draw.choice(sorted(nodes, key=id)), allow_graceful=False)
                self.coming.append(time.monotonic() + self.draw.uniform(0, 20))
                return "node"
        return ""

    def another(self, ended: "subprocess.Popen[str]") -> "subprocess.Popen[str]":
        """A driver in the place of one that was killed; one may end by itself only where it lost its lease or Ray."""
        if ended.returncode not in (-signal.SIGKILL, 1, 3):
            raise AssertionError(f"a driver ended with {ended.returncode}")
        return driver(self.folder, self.storage, self.cluster.address)

    def close(self) -> None:
        """End what is left."""
        for one in self.drivers:
            with suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
            one.wait()
        self.cluster.shutdown()


def driver(folder: Path, storage: Path, address: str = "") -> "subprocess.Popen[str]":
    """`aliprod run`, in a process group of its own; its log is appended to STORAGE.log."""
    command = [sys.executable, "-m", "aliprod", "run", str(folder / "plan.toml"), "--storage", str(storage)]
    with storage.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            command + (["--address", address] if address else []),
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )


def is_rank(process: psutil.Process) -> bool:
    """Whether it trains."""
    with suppress(psutil.Error, IndexError):
        return process.cmdline()[0].startswith("ray::RayTrainWorker")
    return False


def made(storage: Path) -> dict[str, Any]:
    """sha256 of all files that jobs and the ensemble end with, which are looked at, by folder; no resume checkpoints,
    and nothing hidden, which nobody reads: a row of shards that was not finished."""
    records = [path for root in ("jobs", "faults") for path in (storage / root).glob("**/manifest.json")]
    unread = re.compile(r"/(resume|\..*)/")
    folders = [path.parent for path in records if not unread.search(path.relative_to(storage).as_posix())]
    assert all(commit.verify(folder) == [] for folder in folders)
    return {folder.relative_to(storage).as_posix(): commit.digests(folder) for folder in folders}


def twice(storage: Path) -> Iterator[str]:
    """What was told or shown twice."""
    from aliprod.tracking.server import reach

    for file in storage.glob("jobs/*/*/*/metrics.jsonl"):
        epochs = [json.loads(line)["epoch"] for line in file.read_text().splitlines()]
        if epochs != list(range(len(epochs))):
            yield f"{file.parent.name}: epochs {epochs}"
    client = reach(f"sqlite:///{storage / 'mlflow.db'}").client
    runs = client.search_runs([client.get_experiment_by_name("faults").experiment_id])
    kinds = Counter(run.data.tags["aliprod.kind"] for run in runs)
    if kinds != {"plan": 1, "job": 3, "ensemble": 1}:
        yield f"MLflow's runs: {dict(kinds)}"
    versions = Counter((one.name, one.tags["sha256"]) for one in client.search_model_versions())
    yield from (
        f"version {name} {sha256[:8]}: {count} times" for (name, sha256), count in versions.items() if count > 1
    )


if __name__ == "__main__":
    main()
