"""What does a job cost besides its training?

Eight jobs of about a second each (timm's test_resnet on a rendered catalogue), in chains, so that a job waits for its
parent and for nothing else, run by `aliprod run` on a local Ray. Of each job: seconds from its parent's commit (of the
first of a chain: from when the driver launched it) to its own, less those of its training steps; validation, the
network's making and all imports count. Of the whole: processes and memory at their peak, driver and Ray included, once
with pages that processes share counted in each (resident) and once in equal parts (proportional: what the machine has
to hold); and CPU seconds (user and system, of every process) from the first launch to the last commit, a job.

    python benchmarks/job_start.py [--chains 2] [--jobs 8] [--show]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
from ratio import header

from aliprod.store import commit
from aliprod.synth.synth import synthesise

PLAN = """\
format = 1
name = "starts"
[catalogue]
path = "catalogue"
[backbones]
{backbones}
[defaults]
resize = 72
crop = 64
augmentation = ["random_crop", "flip"]
batch_size = 16
epochs = 2
lr = {{ backbone = 0.01, heads = 0.01 }}
[stages.s0]
{stages}
[jobs]
{jobs}
[ensemble]
views = "center"
members = [{members}]
[cluster]
use_gpu = false
max_parallel_jobs = {chains}
poll_seconds = 0.2
"""


@dataclass(frozen=True)
class Sample:
    """A process tree at one moment: its processes by title, their resident and proportional bytes, CPU seconds of it so
    far."""

    time: float
    titles: tuple[str, ...]
    resident: int
    proportional: int
    cpu: float


class Tree:
    """A process and its descendants, looked at now and then; the CPU seconds of those that ended are kept."""

    def __init__(self, pid: int) -> None:
        self.root = psutil.Process(pid)
        self.cpu: dict[tuple[int, float], float] = {}
        self.kinds: dict[tuple[int, float], str] = {}  # of processes, by the last title that they had

    def look(self) -> Sample:
        """Count what is there now."""
        titles, resident, proportional = [], 0, 0
        for process in [self.root, *self.root.children(recursive=True)]:
            try:
                with process.oneshot():
                    times, memory, words = process.cpu_times(), process.memory_full_info(), process.cmdline()
                    self.cpu[process.pid, process.create_time()] = times.user + times.system
                    self.kinds[process.pid, process.create_time()] = title(words)
            except psutil.Error:
                continue
            resident += int(memory.rss)
            proportional += int(memory.pss)
            titles.append(f"{title(words)} {int(memory.rss) >> 20} MB, {int(memory.pss) >> 20} proportional")
        return Sample(time.time(), tuple(titles), resident, proportional, sum(self.cpu.values()))

    def by_kind(self) -> Counter[str]:
        """CPU seconds by title."""
        total = Counter[str]()
        for key, seconds in self.cpu.items():
            total[self.kinds[key]] += seconds
        return total


def title(words: list[str]) -> str:
    """A short name for a process: Ray's own title, else the program or module."""
    if not words:
        return "ended"
    if words[0].startswith("ray::"):
        return words[0].split(".")[0]
    return Path(next((word for word in words if ".py" in word), words[0].split()[0])).name


def main() -> None:
    """Run the plan, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=2, help="jobs side by side")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--show", action="store_true", help="list the processes at the peak")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="starts-"))
    try:
        measure(folder, asked.chains, asked.jobs // asked.chains, asked.show)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, chains: int, length: int, show: bool) -> None:
    """Run ``chains`` chains of ``length`` jobs in a folder and print what they took."""
    synthesise(folder / "catalogue", classes=8, images=160, seed=0)
    (folder / "plan.toml").write_text(plan(chains, length))
    samples, launched, kinds = watched(folder)
    began = min(launched.values())
    rows = [row for chain in range(chains) for row in jobs_of(folder, f"n{chain}", length, launched)]
    ended = max(committed for _, committed, _, _ in rows)
    print(header(("ray", "torch", "timm")))
    for name, _, total, training in rows:
        print(f"  {name:8} {total:5.1f} s from its needs to its commit, {training:4.1f} s of training")
    starts = [total - training for _, _, total, training in rows]
    print(f"{chains} side by side: a job's start median {statistics.median(starts):.1f} s, largest {max(starts):.1f} s")
    peak = max(samples, key=lambda sample: sample.resident)
    inside = [sample for sample in samples if began <= sample.time <= ended]
    cpu = (inside[-1].cpu - inside[0].cpu) / len(rows)
    most = max(len(sample.titles) for sample in samples)
    proportional = max(sample.proportional for sample in samples)
    memory = f"{peak.resident / 1e9:.2f} GB resident, {proportional / 1e9:.2f} GB proportional"
    print(f"  {most} processes, {memory}, {cpu:.1f} CPU s a job")
    print(f"  whole run {samples[-1].time - samples[0].time:.1f} s, {samples[-1].cpu:.1f} CPU s")
    if show:
        print("\n".join(f"    {seconds:6.1f} CPU s {kind}" for kind, seconds in kinds.most_common()))
        print("\n".join(f"    {count} x {name}" for name, count in sorted(Counter(peak.titles).items())))


def plan(chains: int, length: int) -> str:
    """Chains of jobs, each from the one before."""
    names = [f"n{chain}" for chain in range(chains)]
    stages = [f"s{number}" for number in range(length)]
    return PLAN.format(
        backbones="\n".join(f'{name} = "test_resnet.r160_in1k"' for name in names),
        stages="\n".join(f'[stages.{stage}]\nstart = "s{number}"' for number, stage in enumerate(stages[1:])),
        jobs="\n".join(f"{name} = {json.dumps(stages)}" for name in names),
        members=", ".join(f'"{name}/{stages[-1]}"' for name in names),
        chains=chains,
    )


def watched(folder: Path) -> tuple[list[Sample], dict[str, float], Counter[str]]:
    """Run the plan; the samples of its processes, when each job was seen to run first, CPU seconds by title."""
    command = [sys.executable, "-m", "aliprod", "run", "plan.toml", "--storage", "runs"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HOME": str(folder)}
    launched: dict[str, float] = {}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        tree, samples = Tree(process.pid), list[Sample]()
        while process.poll() is None:
            samples.append(tree.look())
            for name in running(folder / "runs" / "starts" / "state.json"):
                launched.setdefault(name, time.time())
            time.sleep(0.25)
    if process.returncode:
        sys.exit((folder / "log").read_text())
    return samples, launched, tree.by_kind()


def running(path: Path) -> list[str]:
    """The jobs that the driver says are running."""
    states = json.loads(path.read_text())["states"] if path.exists() else {}
    return [name for name, state in states.items() if state == "running"]


def jobs_of(
    folder: Path, backbone: str, length: int, launched: dict[str, float]
) -> list[tuple[str, float, float, float]]:
    """Of each job of a chain: its name, when it was committed, seconds from its needs to that, and of its steps."""
    needs_done, rows = launched[f"{backbone}/s0"], []
    for number in range(length):
        [weights] = (folder / "runs" / "jobs" / backbone / f"s{number}").glob("*/weights")
        committed = (weights / commit.MANIFEST).stat().st_mtime
        lines = [json.loads(line) for line in (weights.parent / "metrics.jsonl").read_text().splitlines()]
        steps = (commit.read(weights) or {})["steps"] / len(lines)
        training = sum(steps * 16 / line["speed/images_per_second"] for line in lines)
        rows.append((f"{backbone}/s{number}", committed, committed - needs_done, training))
        needs_done = committed
    return rows


if __name__ == "__main__":
    main()
