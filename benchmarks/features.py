"""Ten learning rates of a linear probe, on cached features and on the images: how much longer is the second?

    python benchmarks/features.py CATALOGUE tf_efficientnet_lite0 --weights FOLDER --crop 128 --resize 144

Each way trains the same classifiers, one after the other in this process, without Ray. On the images some of the rates
are trained (--computed), and the time of all is reckoned from them.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch

from aliprod.build.graph import targets
from aliprod.build.target import Site, Target
from aliprod.plan.load import load
from aliprod.plan.open import Opened, Request, open_plan
from aliprod.plan.places import resolve

PLAN = """\
format = 1
name = "rates"
catalogue = {{ path = {path} }}
backbones = {{ net = "{network}" }}
[defaults]
pretrained = {weights}
resize = {resize}
crop = {crop}
trains = "classifier"
epochs = {epochs}
batch_size = 32
optimizer = {{ name = "adamw" }}
[stages]
{stages}
[jobs]
net = {jobs}
[ensemble]
members = ["net/cached0"]
"""


def main() -> None:
    """Train all rates on cached features, some on the images, and print the ratio."""
    asked = _asked()
    with tempfile.TemporaryDirectory() as folder:
        opened = _opened(Path(folder), asked)
        site = Site.of(opened)
        site = replace(site, cluster=site.cluster.model_copy(update={"cpus_per_worker": torch.get_num_threads()}))
        graph = targets(opened, gpu=torch.cuda.is_available())
        made = [_seconds(need, site) for need in graph["net/cached0"].needs["features"]]
        print(f"features of train and val: {sum(made):.1f} s")
        cached = [_seconds(graph[f"net/cached{number}"], site) for number in range(asked.rates)]
        print(f"{asked.rates} rates on them: {sum(cached):.1f} s, {mean(cached):.2f} s each")
        speeds = [line["speed/images_per_second"] for line in opened.metrics("net/cached0")]
        print(f"an epoch on them: {median(speeds):,.0f} images/s")
        computed = [_seconds(graph[f"net/computed{number}"], site) for number in range(asked.computed)]
        print(f"{asked.computed} rates on the images: {sum(computed):.1f} s, {mean(computed):.1f} s each")
        print(
            f"{asked.rates} of them take {asked.rates * mean(computed) / (sum(made) + sum(cached)):.1f} times as long"
        )
        for number in range(asked.computed):
            errors = [(opened.record(f"net/{way}{number}") or {})["top1_error"] for way in ("cached", "computed")]
            print(f"rate {number}: top-1 error on val {errors[0]:.2%} cached, {errors[1]:.2%} computed")


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalogue", type=Path)
    parser.add_argument("network")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--resize", type=int, default=256)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rates", type=int, default=10)
    parser.add_argument("--computed", type=int, default=2)
    return parser.parse_args()


def _opened(folder: Path, asked: argparse.Namespace) -> Opened:
    rates = np.geomspace(1e-4, 1e-1, asked.rates)
    # the two views are alike where crop is resize; else an image is stretched to crop as a whole
    ways = {"cached": 'features = "cached"', "computed": 'augmentation = ["resize"]'}
    stages = {f"{way}{number}": (said, rate) for way, said in ways.items() for number, rate in enumerate(rates)}
    text = PLAN.format(
        path=json.dumps(str(asked.catalogue.resolve())),
        network=asked.network,
        weights=json.dumps(str(asked.weights.resolve())),
        resize=asked.resize,
        crop=asked.crop,
        epochs=asked.epochs,
        stages="\n".join(
            f"{name} = {{ {said}, lr = {{ heads = {rate:g} }} }}" for name, (said, rate) in stages.items()
        ),
        jobs=json.dumps(list(stages)),
    )
    (folder / "plan.toml").write_text(text)
    plan = load(folder / "plan.toml")
    return open_plan(Request(plan, text, resolve(plan, folder / "runs", None, None)))


def _seconds(target: Target, site: Site) -> float:
    began = time.perf_counter()
    target.make(target, site)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
