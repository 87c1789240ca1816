"""How near does the scheduler come to what no scheduler can beat? The seed's plan and random ones, simulated.

The bound is the longest path with every job at its widest, or all work at one GPU a job spread over all GPUs, whichever
is longer. Speeds are relative: NVIDIA RTX 3090, mixed precision, channels last, as timm's benchmarks list them for each
network's own size, brought to the plan's by the area. A job on n GPUs is n / (1 + loss (n - 1)) times as fast.

    python benchmarks/schedule.py [--plans 1000]
"""

import argparse
import random
import time
from collections.abc import Callable, Iterable
from math import exp, log
from pathlib import Path
from statistics import median, quantiles

from ratio import header

from aliprod.build import schedule
from aliprod.build.allot import BACK_SECONDS, RESTART_SECONDS, Paths, Situation, decide
from aliprod.build.room import Node
from aliprod.build.target import Resources, Target
from aliprod.forecast.simulate import Clock, Span
from aliprod.plan.jobs import Job, jobs_of
from aliprod.plan.load import load
from aliprod.recipe import PerClass

SEED = Path(__file__).resolve().parents[1] / "jobs" / "aliproducts.toml"
SPEEDS = {  # images/s in training, and the side of the pictures
    "resnet50": (1218, 224),
    "seresnext50": (815, 224),
    "seresnet101": (590, 224),
    "efficientnet-b3": (572, 288),
    "efficientnet-b4": (355, 320),
}
IMAGES, BALANCED, VAL, TEST = 2_500_000, 1_300_000, 150_000, 250_000  # of AliProducts, about
FORWARD = 1 / 3  # of the time of a training step: no backward pass
SIZES, A_NODE = (1, 2, 4, 8), 8  # GPUs
BARS = {4: 1.02, 8: 1.04, 16: 1.10, 32: 1.20, 64: 1.5}
RANK = Resources(8, 1)


def nodes(gpus: int) -> list[Node]:
    """Machines of eight GPUs, or one of fewer."""
    size = min(gpus, A_NODE)
    return [Node(f"node {number}", Resources(8 * size, size)) for number in range(gpus // size)]


def nothing(_: object, __: object) -> tuple[()]:
    """Make a target of no bytes."""
    return ()


def target(name: str, needs: Iterable[Target], kind: str = "training", sizes: tuple[int, ...] = SIZES) -> Target:
    """What the scheduler sees of a job."""
    return Target(kind, name, None, None, nothing, {"needs": tuple(needs)}, resources=RANK, world_sizes=sizes)


def seed() -> dict[Target, float]:
    """The targets of the seed's plan, and the seconds of each on one GPU."""
    plan = load(SEED)
    found: dict[Target, float] = {}
    by_name: dict[str, Target] = {}
    predictions = []
    for name, job in jobs_of(plan, None).items():
        by_name[name] = target(name, [by_name[parent] for parent in job.parents])
        found[by_name[name]] = (
            job.stage.epochs
            * (images(job) * (2 if job.stage.objective.name == "dcl" else 1) + FORWARD * VAL)
            / speed(job)
        )
        if job.member:
            predictions.append(target(f"{name} test", [by_name[name]], "prediction"))
            found[predictions[-1]] = 10 * FORWARD * TEST / speed(job)
    found[Target("ensemble", "ensemble", None, None, nothing, {"members": tuple(predictions)})] = 0.0
    return found


def images(job: Job) -> int:
    """Of an epoch."""
    return BALANCED if isinstance(job.stage.images, PerClass) else IMAGES


def speed(job: Job) -> float:
    """Images/s of a training on one GPU."""
    rate, side = SPEEDS[job.backbone]
    return rate * (side / job.stage.crop) ** 2


def random_plan(rng: random.Random) -> dict[Target, float]:
    """16 to 1,000 jobs of half an hour to two days, most of which start from an earlier one."""
    found: dict[Target, float] = {}
    starts, recent = rng.uniform(0.3, 0.95), rng.choice([3, 20, 1000])
    for number in range(round(exp(rng.uniform(log(16), log(1000))))):
        before = list(found)[-recent:]
        needs = rng.sample(before, min(len(before), 1 + (rng.random() < 0.1))) if rng.random() < starts else []
        found[target(f"job {number}", needs)] = exp(rng.uniform(log(1800), log(172_800)))
    return found


def scaled(loss: float, seconds: dict[Target, float]) -> Callable[[Target, int], float]:
    """The seconds of a target at a world size."""
    return lambda target, size: seconds[target] * (1 + loss * (size - 1)) / size


def bound(seconds: dict[Target, float], at: Callable[[Target, int], float], gpus: int) -> float:
    """Seconds that no schedule goes below."""
    paths: dict[Target, float] = {}
    for one in seconds:
        widest = max((size for size in one.world_sizes if size <= gpus), default=1)
        paths[one] = at(one, widest) + max((paths[need] for need in one.needed()), default=0.0)
    return max(*paths.values(), sum(seconds.values()) / gpus)


def ratio(seconds: dict[Target, float], gpus: int, loss: float) -> tuple[float, int, int]:
    """The makespan over the bound, how often a job was started again, and how often it soon had the ranks again that it
    had before."""
    at = scaled(loss, seconds)
    clock = Clock(nodes(gpus), at, RESTART_SECONDS, RESTART_SECONDS)
    for _ in schedule.execute({one.name: one for one in seconds}, clock):
        pass
    assert set(clock.spans) == {one.name for one in seconds}
    again = sum(len(spans) - 1 for spans in clock.spans.values())
    return clock.time / bound(seconds, at, gpus), again, sum(map(to_and_fro, clock.spans.values()))


def to_and_fro(spans: list[Span]) -> int:
    """How often a job had other ranks for less than `BACK_SECONDS`, and then those from before."""
    turns = zip(spans, spans[1:], spans[2:], strict=False)
    return sum(
        one.ranks == three.ranks != two.ranks and three.begin - one.end < BACK_SECONDS for one, two, three in turns
    )


def decision_seconds(rng: random.Random) -> list[float]:
    """How long a first decision for 1,000 jobs takes."""
    taken = []
    for gpus in BARS:
        plan: dict[Target, float] = {}
        while len(plan) != 1000:
            needs = rng.sample(list(plan), 1) if plan and rng.random() < 0.8 else []
            plan[target(f"job {len(plan)}", needs)] = exp(rng.uniform(log(1800), log(172_800)))
        by_name = {one.name: one for one in plan}
        began = time.process_time()
        decide(Situation(by_name, {}, nodes(gpus), Paths.of(by_name, scaled(0.02, plan))))
        taken.append(time.process_time() - began)
    return taken


def main() -> None:
    """Print what was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=1000)
    asked = parser.parse_args()
    print(header(()))
    for loss in (0.02, 0.06):
        print(f"the seed's plan, {loss:.0%} lost a GPU:")
        for gpus, bar in BARS.items():
            found, again, back = ratio(seed(), gpus, loss)
            print(
                f"  {gpus:3} GPUs: {found:.3f} of the bound"
                + (f" (bar {bar})" if loss == 0.02 else "")
                + f", {again} restarts, {back} to and fro"
            )
    rng = random.Random(0)
    taken = decision_seconds(rng)
    print(f"a decision for 1,000 jobs: {1000 * median(taken):.0f} ms, {1000 * max(taken):.0f} at most (bar 50)")
    found, restarts, backs = [], 0, 0
    for number in range(asked.plans):
        gpus = rng.choice(list(BARS))
        plan = random_plan(rng)
        value, again, back = ratio(plan, gpus, 0.02)
        restarts, backs = restarts + again, backs + back
        found.append((value, number, len(plan), gpus, again))
    values = sorted(value for value, *_ in found)
    print(
        f"{asked.plans} random plans, 2 % lost a GPU: median {median(values):.3f} (bar 1.05), "
        f"90 % below {quantiles(values, n=10)[-1]:.3f}; {restarts} restarts, {backs} to and fro"
    )
    print(
        "worst:",
        *(
            f"{value:.3f} (plan {n}, {jobs} jobs, {gpus} GPUs, {again} restarts)"
            for value, n, jobs, gpus, again in sorted(found)[-8:]
        ),
    )
    for gpus in BARS:
        of = [v for v, _, _, g, _ in found if g == gpus]
        if of:
            print(f"  {gpus:3} GPUs: {len(of)} plans, median {median(of):.3f}, worst {max(of):.3f}")


if __name__ == "__main__":
    main()
