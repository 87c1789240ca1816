"""Is a key trained once, whenever two drivers meet on one storage path, and how soon is one that dies replaced?

Two drivers of a plan of one job, each with a Ray of its own, as on two machines. Printed for each timing: how often
the key was trained, by the drivers' outcomes and by the epochs that were told twice; seconds from the death of the
first, or from when it was stopped, to the other's lease of the training; and whether both ended with the same ensemble.

    python benchmarks/drivers.py [--timings together middle killed stopped skew end]
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ratio import header

from aliprod.store import commit
from aliprod.store.layout import METRICS, newest_step
from aliprod.synth.synth import synthesise

PLAN = """\
format = 1
name = "drivers"
[catalogue]
path = "catalogue"
[backbones]
net = "test_resnet"
[defaults]
pretrained = false
resize = 72
crop = 64
augmentation = ["random_crop", "flip"]
batch_size = 16
epochs = 20
lr = { backbone = 0.02, heads = 0.02 }
[stages.full]
[jobs]
net = ["full"]
[ensemble]
members = ["net/full"]
[cluster]
use_gpu = false
save_every_steps = 4
poll_seconds = 0.2
"""
SKEW = "import time\n_time = time.time\ntime.time = lambda: _time() + 259200\n"  # three days, in all its processes
KEY = "[0-9a-f]" * 64
MOST_SECONDS = 400


@dataclass(frozen=True)
class Pair:
    """A storage path, and how to start drivers on it."""

    folder: Path
    storage: Path

    def start(self, skewed: bool = False) -> "subprocess.Popen[str]":
        """A driver, in a process group of its own."""
        path = [str(self.folder / "skew")] * skewed + [os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        command = [sys.executable, "-m", "aliprod", "run", str(self.folder / "plan.toml"), "--json"]
        command += ["--storage", str(self.storage)]
        with self.storage.with_suffix(".log").open("a") as log:
            streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
            return subprocess.Popen(command, env=environment, start_new_session=True, **streams)

    @property
    def job(self) -> Path:
        return next(self.storage.glob("jobs/net/full/*"), self.storage)

    def holder(self) -> int:
        """The process that holds the lease of the training; 0 where none does."""
        with suppress(OSError, ValueError, StopIteration):
            return int(json.loads(next(self.storage.glob(f".leases/{KEY}/*")).read_text())["pid"])
        return 0


def together(pair: Pair) -> tuple[list[Any], float]:
    """Both at once, on a new folder."""
    return [pair.start(), pair.start()], 0.0


def middle(pair: Pair) -> tuple[list[Any], float]:
    """The second while the first trains."""
    first = pair.start()
    until(lambda: newest_step(pair.job) is not None)
    return [first, pair.start()], 0.0


def killed(pair: Pair, number: int = signal.SIGKILL) -> tuple[list[Any], float]:
    """The first is killed while it trains and the second waits."""
    drivers = [pair.start(), pair.start()]
    until(lambda: newest_step(pair.job) is not None and pair.holder())
    first = next(one for one in drivers if one.pid == pair.holder())
    os.killpg(first.pid, number)
    began = time.monotonic()
    until(lambda: pair.holder() not in (0, first.pid))
    took = time.monotonic() - began
    if number == signal.SIGSTOP:
        os.killpg(first.pid, signal.SIGCONT)
    return [*drivers, pair.start()], took  # one that sees what the others have left


def stopped(pair: Pair) -> tuple[list[Any], float]:
    """The first is stopped for longer than others have patience, and goes on."""
    return killed(pair, signal.SIGSTOP)


def skew(pair: Pair) -> tuple[list[Any], float]:
    """The second's clock is three days ahead."""
    return [pair.start(), pair.start(skewed=True)], 0.0


def end(pair: Pair) -> tuple[list[Any], float]:
    """The second begins when the first has just finished the training."""
    first = pair.start()
    until(lambda: commit.read(pair.job / "weights") is not None)
    return [first, pair.start()], 0.0


TIMINGS: dict[str, Callable[[Pair], tuple[list[Any], float]]] = {
    one.__name__: one for one in (together, middle, killed, stopped, skew, end)
}


def main() -> None:
    """Print a row for each timing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timings", nargs="+", choices=TIMINGS, default=list(TIMINGS))
    asked = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
    print(header(("torch", "ray", "mlflow")), flush=True)
    print("| timing | trained | epochs told twice | seconds to take over | same ensemble |\n|---|---|---|---|---|")
    with scene() as folder:
        wrong = [name for name in asked.timings if not row(name, Pair(folder, folder / name))]
    sys.exit(f"wrong: {', '.join(wrong)}" if wrong else 0)


@contextmanager
def scene() -> Iterator[Path]:
    """A folder with the plan, its catalogue, and a module that puts a clock on; in the end nothing is left of it."""
    folder = Path(tempfile.mkdtemp(prefix="drivers-"))
    try:
        synthesise(folder / "catalogue", classes=8, images=320, seed=0)
        (folder / "plan.toml").write_text(PLAN)
        (folder / "skew").mkdir()
        (folder / "skew" / "sitecustomize.py").write_text(SKEW)
        yield folder
    finally:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        shutil.rmtree(folder, ignore_errors=True)


def row(name: str, pair: Pair) -> bool:
    """Play a timing; whether all was as it should be."""
    drivers, took = TIMINGS[name](pair)
    outcomes = [json.loads(out.splitlines()[-1]) for out in map(ended, drivers) if out]
    trained = sum(len(outcome["trained"]) for outcome in outcomes)
    epochs = [json.loads(line)["epoch"] for line in (pair.job / METRICS).read_text().splitlines()]
    same = all(outcome["ensemble"] == outcomes[0]["ensemble"] for outcome in outcomes) and len(outcomes) > 1
    twice = len(epochs) - len(set(epochs))
    print(f"| {name} | {trained} | {twice} | {took:.0f} | {'yes' if same else 'NO'} |", flush=True)
    return (trained, twice, same) == (1, 0, True) and took <= 60


def ended(driver: "subprocess.Popen[str]") -> str:
    """What a driver printed; nothing of one that was killed, or lost its lease while it was stopped."""
    out, _ = driver.communicate(timeout=MOST_SECONDS)
    if driver.returncode not in (0, 1, -signal.SIGKILL):
        raise AssertionError(f"a driver ended with {driver.returncode}")
    return out if driver.returncode == 0 else ""


def until(true: Callable[[], object]) -> None:
    """Wait."""
    end = time.monotonic() + MOST_SECONDS
    while not true():
        if time.monotonic() > end:
            raise AssertionError("nothing happened")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
