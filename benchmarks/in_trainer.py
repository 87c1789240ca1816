"""What the same training costs inside a Ray TorchTrainer, against bare: a step, and an epoch with its report.

Both sides iterate `aliprod.training.loop.train` in a process of their own, in turn, and stamp the CPU time of that
process (all threads, Ray's too) after each step; the weights must be equal to the bit. Ray is told once an epoch, as
`aliprod.orchestration.worker` does.

    python benchmarks/in_trainer.py [--rounds 5] [--steps 200] [--epochs 2] [--seeds 0 1]
"""

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ratio import Side, cpu, header

WARM_UP = 20  # steps at the beginning of a process that are not counted


def main() -> None:
    """Compare over two sets of pictures."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    asked = parser.parse_args()
    print(header(("torch", "ray")))
    here = str(Path(__file__).resolve().parent)
    paths = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    env = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": env})
    for seed in asked.seeds:
        folder = Path(tempfile.mkdtemp(prefix="in-trainer-"))
        try:
            compare(folder, seed, asked.rounds, asked.steps, asked.epochs)
        finally:
            shutil.rmtree(folder)


def compare(folder: Path, seed: int, rounds: int, steps: int, epochs: int) -> None:
    """Both sides in turn."""
    from step import photos

    photos(folder / "photos", seed, 8 * steps)
    runs: dict[str, list[dict[str, Any]]] = {"trainer": [], "bare": []}
    for number in range(rounds):
        for side, call in (("trainer", in_trainer), ("bare", bare)):
            config = {"photos": folder / "photos", "out": folder / f"{side}-{number}", "seed": seed, "epochs": epochs}
            call(config)
            runs[side].append(json.loads((folder / f"{side}-{number}").read_text()))
    if len({run["sha256"] for found in runs.values() for run in found}) != 1:
        sys.exit("no equal work: the weights differ")
    print(f"pictures of seed {seed}: equal weights, {rounds} rounds of {epochs} epochs of {steps} steps")
    for what, unit, scale in (("step", "ms", 1000.0), ("epoch", "s", 1.0)):
        ours, theirs = (Side(side, tuple(run[what] for run in found)) for side, found in runs.items())
        more = [scale * (a - b) for a, b in zip(ours.rounds, theirs.rounds, strict=True)]
        share = 100 * statistics.median(more) / (scale * theirs.median)
        print(
            f"  CPU of a {what}: trainer {scale * ours.median:.3f} {unit}, bare {scale * theirs.median:.3f} {unit}, "
            f"{statistics.median(more):+.3f} {unit} ({min(more):+.3f} to {max(more):+.3f}), {share:+.1f} %"
        )
    reports = [seconds for run in runs["trainer"] for seconds in run["reports"]]
    print(f"  a report takes {statistics.median(reports):.2f} s of wall time (once an epoch)")


def in_trainer(config: dict[str, Any]) -> None:
    """One rank inside a TorchTrainer."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        trained,
        train_loop_config=config | {"report": True},
        torch_config=TorchConfig("gloo"),
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name=config["out"].name, storage_path=str(config["out"].parent / "ray")),
    ).fit()


def bare(config: dict[str, Any]) -> None:
    """The same in a process that has never heard of Ray."""
    process = multiprocessing.get_context("spawn").Process(target=trained, args=(config,))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit("the bare side failed")


def trained(config: dict[str, Any]) -> None:
    """Train; CPU seconds of a step and of an epoch (the first steps apart), and the sha256 of the weights."""
    import hashlib

    from step import NETWORK

    from aliprod.data import sources
    from aliprod.recipe import Stage
    from aliprod.training.loop import train

    logging.disable(logging.WARNING)
    stage = Stage(
        seed=config["seed"],
        resize=32,
        crop=32,
        batch_size=8,
        epochs=config["epochs"],
        augmentation=("resize",),
        ema=0.99,
    )
    stamps: list[float] = []
    ends: list[float] = []
    reports: list[float] = []
    for progress in train(stage, NETWORK, sources.read(config["photos"]), after_step=lambda: stamps.append(cpu())):
        if config.get("report"):
            import ray.train

            began = time.perf_counter()
            ray.train.report({"epoch": progress.state.epoch, **progress.metrics})
            reports.append(time.perf_counter() - began)
        ends.append(cpu())
        assert progress.end is not None
        weights = progress.end.last.tensors
    digest = hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()
    per_epoch = len(stamps) // config["epochs"]
    between = [b - a for number, (a, b) in enumerate(itertools.pairwise(stamps), 1) if number % per_epoch]
    counted = between[WARM_UP:]
    found = {
        "sha256": digest,
        "step": sum(counted) / len(counted),
        "epoch": (ends[-1] - ends[0]) / (len(ends) - 1),
        "reports": reports,
    }
    config["out"].write_text(json.dumps(found))


if __name__ == "__main__":
    main()
