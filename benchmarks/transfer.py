"""jobs/transfer.toml on a catalogue with labelled test images, several seeds: what each stage and their sum is worth.

    python benchmarks/transfer.py CATALOGUE --storage FOLDER [--seeds 3] [--views ten_crop] [--set SETTING ...]

A line a job: the top-1 error on the test images of the best epoch by val, per cent, a mean over the seeds;
its gain on the job that it starts from and, of what has one beside it, on `control`. Negative is better. Intervals are
of 95 %, by the draws of the images that the project's own comparisons have, for classes of as many test images each.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from ablation import run
from ratio import header

from aliprod.catalogue import sources
from aliprod.catalogue.catalogue import Catalogue, Integers
from aliprod.ensemble.compare import drawn_errors
from aliprod.inference.predict import predicted, ready
from aliprod.recipe import Views

PLAN = Path(__file__).resolve().parents[1] / "jobs" / "transfer.toml"
Values = np.ndarray[Any, np.dtype[np.float64]]


def main() -> None:
    """Run the plan for each seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalogue", type=Path)
    parser.add_argument("--storage", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--views", choices=["ten_crop", "center"], default="ten_crop")
    parser.add_argument("--set", action="append", default=[])
    asked = parser.parse_args()
    catalogue, wrong, parents = sources.read(asked.catalogue), dict[str, list[Values]](), dict[str, str]()
    for seed in range(asked.seeds):
        own = [f"name='transfer-{seed}'", f"seed={seed}", f"catalogue.path='{asked.catalogue.resolve()}'"]
        own.append(f"ensemble.views='{asked.views}'")
        jobs = run(PLAN, asked.storage, [*own, *asked.set])
        found = {
            name: probabilities(asked.storage / "jobs" / name / job["key"] / "weights", catalogue, asked.views)
            for name, job in jobs.items()
        }
        found["ensemble"] = np.sum([found[name] for name, job in jobs.items() if job["member"]], axis=0)
        for name, sums in found.items():
            wrong.setdefault(name, []).append((sums.argmax(axis=1) != catalogue.test_labels).astype(np.float64))
        parents = {name: next(iter(job["parents"]), "") for name, job in jobs.items()}
    means = {name: np.mean(each, axis=0) for name, each in wrong.items()}
    members = [name for name, job in jobs.items() if job["member"]]
    parents["ensemble"] = min(members, key=lambda name: means[name].mean())
    show(means, wrong, parents, catalogue.test_labels)


def probabilities(folder: Path, catalogue: Catalogue, views: Views) -> Values:
    """Of the test images (n, K)."""
    member = ready(folder)
    blocks = [block.double().numpy() for block in predicted(member, catalogue.test, views)]
    return np.concatenate(blocks)


def interval(mean: float, drawn: Values) -> str:
    """A mean in per cent, with the interval of its draws."""
    low, high = np.percentile(100 * drawn, [2.5, 97.5])
    return f"{100 * mean:.1f} ({low:.1f} to {high:.1f})"


def show(means: dict[str, Values], wrong: dict[str, list[Values]], parents: dict[str, str], labels: Integers) -> None:
    """Print the table in Markdown."""
    drawn = dict(zip(means, drawn_errors(np.stack(list(means.values())), labels, seed=0).T, strict=True))

    def gain_on(name: str, other: str) -> str:
        return interval(float(means[name].mean() - means[other].mean()), drawn[name] - drawn[other])

    print(header(("torch", "torchvision", "timm", "ray", "pillow")))
    print("| job | error on test, % | each seed | gain on | points | on control |\n|---|---|---|---|---|---|")
    for name, values in means.items():
        parent, control = parents[name], f"{name.partition('/')[0]}/control"
        each = ", ".join(f"{100 * one.mean():.1f}" for one in wrong[name])
        gain = gain_on(name, parent) if parent else ""
        beside = control in means and parent == parents[control] and name != control
        against = gain_on(name, control) if beside else ""
        print(f"| {name} | {interval(float(values.mean()), drawn[name])} | {each} | {parent} | {gain} | {against} |")


if __name__ == "__main__":
    main()
