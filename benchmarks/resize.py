"""How long does a job stand still when it is given other ranks?

A small job runs on two ranks, each on a node of its own, until one of the nodes is about to go. The scheduler stops it
with a checkpoint and starts it on what is left. Of each round: seconds from the notice to the checkpoint, and to the
second new step (which tells the first's end), on one rank; the steps between the last one that was made and the one
that it goes on from are those that were lost.

    python benchmarks/resize.py [--rounds 5] [--network test_resnet]
"""

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ratio import header
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from aliprod.store import epochs
from aliprod.store.layout import newest_step
from aliprod.synth.synth import synthesise

PLAN = """\
format = 1
name = "resize"
[catalogue]
path = "catalogue"
[backbones]
net = "{network}"
[defaults]
pretrained = false
resize = 72
crop = 64
augmentation = ["random_crop", "flip"]
batch_size = 32
shares = 2
epochs = 1000
lr = {{ backbone = 0.01, heads = 0.01 }}
[stages.full]
[jobs]
net = ["full"]
[ensemble]
members = ["net/full"]
[cluster]
use_gpu = false
cpus_per_worker = 1
save_every_steps = 1000000
poll_seconds = 0.2
"""


def main() -> None:
    """Take a node away, again and again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--network", default="test_resnet")
    asked = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    print(header(("torch", "ray")), flush=True)
    folder = Path(tempfile.mkdtemp(prefix="resize-"))
    try:
        synthesise(folder / "catalogue", classes=8, images=640, seed=0)
        (folder / "plan.toml").write_text(PLAN.format(network=asked.network))
        taken = [resized(folder, folder / f"round-{number}") for number in range(asked.rounds)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, values in zip(("checkpoint", "second new step"), zip(*taken, strict=True), strict=True):
        print(f"from the notice to the {name}: {statistics.median(values):.1f} s ({min(values):.1f}-{max(values):.1f})")


def resized(folder: Path, storage: Path) -> tuple[float, float]:
    """Seconds from the notice to the checkpoint, and to the second step on one rank."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}, connect=True)
    going, _ = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    command = [sys.executable, "-m", "aliprod", "run", folder / "plan.toml", "--storage", storage]
    with (folder / "log").open("w") as log:
        streams: dict[str, Any] = {"stdout": log, "stderr": log, "start_new_session": True}
        driver = subprocess.Popen([*map(str, command), "--address", cluster.address], **streams)
    try:
        place = lambda: next(iter(storage.glob("jobs/net/full/*")), storage)  # noqa: E731
        until(driver, lambda: pace(place()).get("ranks") == 2)
        time.sleep(3)
        drain, reason = ray._private.worker.global_worker.gcs_client.drain_node, DrainNodeReason
        began = time.time()
        drain(going.node_id, reason.DRAIN_NODE_REASON_PREEMPTION, "benchmark", int(1e3 * (began + 300)))
        until(driver, lambda: newest_step(place()) is not None)
        saved = time.time()
        until(driver, lambda: pace(place()).get("ranks") == 1)
        again, step = pace(place()), newest_step(place())
        print(f"  checkpoint of step {step}; the second step after it was {again['step']}", flush=True)
        return saved - began, again["time_ms"] / 1000 - began
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        ray.shutdown()
        cluster.shutdown()


def pace(folder: Path) -> dict[str, Any]:
    """What a job last told."""
    return epochs.pace(folder) or {}


def until(driver: "subprocess.Popen[str]", true: Any) -> None:
    """Wait, while the driver runs."""
    while not true():
        if driver.poll() is not None:
            sys.exit(f"the driver ended with {driver.returncode}")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
