"""jobs/ablation.toml on a small catalogue, several seeds: what each method gains on the job that it starts from.

Small networks from scratch at 64 pixels, the same budget for every method: all that two cores can do. It says little
of large pretrained networks on millions of images; it says that every method runs, and what it does here.

    python benchmarks/ablation.py CATALOGUE --storage FOLDER [--seeds 3]

A line a job: the top-1 error on the test images (mean over classes, per cent; centre crop of the best epoch by val),
mean and range over the seeds, and its gain on the job that it starts from, seed by seed. Negative is better.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ratio import header

from aliprod.catalogue import sources
from aliprod.catalogue.catalogue import Catalogue
from aliprod.data.loader import Feed
from aliprod.inference.metrics import mean_class_error
from aliprod.inference.predict import predict
from aliprod.models import weights

PLAN = Path(__file__).resolve().parents[1] / "jobs" / "ablation.toml"
INSTEAD_OF_BALANCED = ("balanced", "filtered", "bbn", "logit_adjustment", "class_balanced")
ON_TOP = (
    "control",
    "focal",
    "angular",
    "hierarchy",
    "bi_tempered",
    "accuracy",
    "pseudo",
    "distillation",
    "smoothing",
    "mixup",
)


def settings(catalogue: Path, seed: int) -> Iterator[str]:
    """The plan's settings for two cores: the same for every method."""
    yield f"name='ablation-{seed}'"
    yield f"seed={seed}"
    yield f"catalogue.path='{catalogue.resolve()}'"
    yield "backbones={ resnet50 = 'resnet10t', efficientnet-b3 = 'efficientnet_lite0' }"
    yield (
        "defaults={ pretrained = false, images = { per_class = 30 }, resize = 72, crop = 64, batch_size = 32, "
        "augmentation = ['random_crop', 'flip'], precision = 'float32' }"
    )
    yield f"stages.full={{ images = 'all', epochs = 24, lr = {rate(0.05, 1)} }}"
    yield f"overrides={{ 'efficientnet-b3/full' = {{ lr = {rate(0.1, 2)} }} }}"
    for stage in INSTEAD_OF_BALANCED:
        yield f"stages.{stage}.epochs=8"
        yield f"stages.{stage}.lr={rate(0.02, 0.5)}"
    for stage in (*ON_TOP, "crt"):
        yield f"stages.{stage}.epochs=6"
        yield f"stages.{stage}.lr={rate(0.02, 0.3)}"
    yield "stages.dcl={ start = 'balanced', objective = { name = 'dcl', parts = 2 }, epochs = 6 }"
    yield f"stages.dcl.lr={rate(0.02, 0.3)}"
    yield "cluster={ cpus_per_worker = 1, max_parallel_jobs = 2, use_gpu = false, poll_seconds = 0.2 }"


def rate(highest: float, warmup_epochs: float) -> str:
    """A learning rate with half a cosine after the warm-up, in TOML."""
    return f"{{ backbone = {highest}, heads = {highest}, schedule = 'cosine', warmup_epochs = {float(warmup_epochs)} }}"


def main() -> None:
    """Run the plan for each seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalogue", type=Path)
    parser.add_argument("--storage", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    catalogue = sources.read(asked.catalogue)
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(asked.seeds):
        jobs = run(PLAN, asked.storage, settings(asked.catalogue, seed))
        errors = {
            name: test_error(asked.storage / "jobs" / name / job["key"] / "weights", catalogue)
            for name, job in jobs.items()
        }
        for name, job in jobs.items():
            start = next(iter(job["parents"]), name)
            of_job = found.setdefault(name, {"error": [], "gain": []})
            of_job["error"].append(errors[name])
            of_job["gain"].append(errors[name] - errors[start])
    show(found)


def run(plan: Path, storage: Path, settings: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Run a plan with settings; its jobs by name, as `aliprod plan --json` lists them."""
    sets = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "aliprod"]
    where = [str(plan), "--storage", str(storage), *sets]
    if subprocess.run([*command, "run", *where], check=False).returncode:
        sys.exit("the plan did not run to its end")
    listed = subprocess.check_output([*command, "plan", *where, "--json"], text=True)
    return {job["name"]: job for job in json.loads(listed.splitlines()[-1])["jobs"]}


def test_error(folder: Path, catalogue: Catalogue) -> float:
    """Per cent, mean over classes."""
    model, config, _ = weights.load(folder)
    feed = Feed(torch.device("cpu"), config.mean, config.std, config.interpolation)
    predicted = np.zeros(len(catalogue.test), dtype=np.int64)
    for rows, probabilities in predict(model, catalogue.test, config.resize, config.crop, "center", feed):
        predicted[rows] = probabilities.argmax(dim=1).numpy()
    labels = torch.from_numpy(catalogue.test_labels)
    return 100 * float(mean_class_error(labels, torch.from_numpy(predicted), catalogue.num_classes))


def show(found: dict[str, dict[str, list[float]]]) -> None:
    """Print the table in Markdown."""
    print(header(("torch", "torchvision", "timm", "ray", "pillow")))
    print("| job | error on test, % | range | gain on its parent, points: mean | each seed |\n|---|---|---|---|---|")
    for name, job in found.items():
        error, gain = job["error"], job["gain"]
        each = ", ".join(f"{one:+.1f}" for one in gain)
        ends = f"{min(error):.1f} to {max(error):.1f}"
        print(f"| {name} | {statistics.mean(error):.1f} | {ends} | {statistics.mean(gain):+.1f} | {each} |")


if __name__ == "__main__":
    main()
