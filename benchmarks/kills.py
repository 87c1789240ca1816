"""Is the result of a job that was killed at a random moment the same, byte for byte?

A small job (efficientnet-like, dropout, averaged weights, augmentation) trains undisturbed; then again and again, each
time ended with SIGKILL at a random moment of its life and started anew. Compared are the weights of the best and of
the last epoch, the metrics of each epoch, and the probabilities that the weights give.

    python benchmarks/kills.py [--kills 20] [--seed 0] [--network test_efficientnet]
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from ratio import header

from aliprod.catalogue import sources
from aliprod.data.loader import Feed
from aliprod.inference.predict import predict
from aliprod.models import weights
from aliprod.recipe import Machine, Stage, TrainingJob
from aliprod.store import commit
from aliprod.synth.synth import synthesise
from aliprod.training import job

CLOCK = ("time_ms", "speed/")


def main() -> None:
    """Kill, or be the job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the pictures, the training and the moments")
    parser.add_argument("--network", default="test_efficientnet")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.job:
        train(asked.job, asked.network, asked.seed)
        return
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        compare(folder, asked.kills, asked.seed, asked.network)
    finally:
        shutil.rmtree(folder)


def compare(folder: Path, kills: int, seed: int, network: str) -> None:
    """Undisturbed, then ``kills`` times disturbed."""
    print(header())
    synthesise(folder / "photos", classes=8, images=160, seed=seed)
    process, began = started(folder / "undisturbed", network, seed)
    if process.wait():
        sys.exit("the undisturbed job failed")
    seconds, expected = time.monotonic() - began, outcome(folder / "undisturbed")
    print(f"seed {seed}: the undisturbed job takes {seconds:.1f} s")
    draw, same, resumed = random.Random(seed), 0, 0
    for number in range(kills):
        place = folder / f"killed-{number}"
        moment = killed(place, network, seed, draw, seconds)
        newest = max((path.parent.name for path in (place / "resume").glob("step-*/manifest.json")), default="none")
        process, _ = started(place, network, seed)
        if process.wait():
            sys.exit("the job failed after it was killed")
        equal = outcome(place) == expected
        same, resumed = same + equal, resumed + (newest != "none")
        print(f"  killed after {moment:5.2f} s, newest checkpoint {newest}: {'same bytes' if equal else 'OTHER BYTES'}")
        shutil.rmtree(place)
    print(f"same bytes: {same} of {kills}, {resumed} of them from a checkpoint")
    sys.exit(same != kills)


def killed(place: Path, network: str, seed: int, draw: random.Random, seconds: float) -> float:
    """Start a job and kill it; after how many seconds. One that was faster than its moment is tried again."""
    while True:
        moment = draw.uniform(0, seconds)
        process, began = started(place, network, seed)
        try:
            if process.wait(max(0.0, began + moment - time.monotonic())):
                sys.exit("the job failed before it was killed")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            if commit.read(place / "weights") is None:
                return moment
        shutil.rmtree(place)


def started(place: Path, network: str, seed: int) -> tuple[subprocess.Popen[str], float]:
    """A process of the job, and when it had imported what it needs."""
    command = [sys.executable, __file__, "--job", str(place), "--network", network, "--seed", str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process, time.monotonic()


def train(place: Path, network: str, seed: int) -> None:
    """The job itself."""
    stage = Stage(
        seed=seed,
        resize=72,
        crop=64,
        batch_size=16,
        epochs=4,
        augmentation=("random_resized_crop", "flip", "auto_augment", "cutout"),
        drop_rate=0.2,
        ema=0.95,
    )
    print("ready", flush=True)
    work = TrainingJob("net/stage", "0123", network, stage, place, machine=Machine(save_every_steps=3))
    for _ in job.run(work, sources.read(place.parent / "photos")):
        pass


def outcome(place: Path) -> dict[str, str]:
    """sha256 of all that a job leaves."""
    kept = {name: place / name for name in ("weights", "last") if (place / name).exists()}
    found = {name: commit.digests(folder)["model.safetensors"] for name, folder in kept.items()}
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    told = [{key: value for key, value in line.items() if not key.startswith(CLOCK)} for line in lines]
    model, config, _ = weights.load(place / "weights")
    feed = Feed(torch.device("cpu"), config.mean, config.std, config.interpolation)
    images = sources.read(place.parent / "photos").test
    rows = torch.cat([p for _, p in predict(model.eval(), images, 72, 64, "ten_crop", feed)])
    return found | {"metrics": json.dumps(told), "probabilities": str(rows.numpy().tobytes().hex())}


if __name__ == "__main__":
    main()
