"""Which of timm's networks train here, at which sizes of images, with which objectives?

python benchmarks/networks.py names            aliprod/plan/networks.txt: all names, their sizes and tags of weights
python benchmarks/networks.py sizes            aliprod/plan/sizes.json: sizes and strides of all, no arithmetic
python benchmarks/networks.py survey           docs/networks.md: the smallest of each family, trained and asked
"""

import argparse
import json
import math
import re
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from PIL import Image
from timm.models import list_modules

from aliprod.data.loader import Feed, TrainBatch
from aliprod.errors import Refused
from aliprod.export import formats
from aliprod.export.formats import WholeModel
from aliprod.inference.classify import Recogniser
from aliprod.inference.predict import Ready
from aliprod.models.classifier import Classifier, _backbone, _made, check_network, normalisation, own_size
from aliprod.models.weights import Classes, Config
from aliprod.objectives import Context, build
from aliprod.store.lineage import Voice

ROOT = Path(__file__).resolve().parents[1]
NAMES = ROOT / "aliprod/plan/networks.txt"
TABLE, PAGE = ROOT / "aliprod/plan/sizes.json", ROOT / "docs/networks.md"
SIZES = (64, 96, 224)
PROBED = (64, 96, 100, 104, 112)  # multiples of 32, 32, 4, 8, 16
FINE = range(32, 513, 16)  # where no multiple explains them
LARGEST = 100_000_000  # parameters of what is trained for docs/networks.md
_OF_SIZE = re.compile(  # parts of a name that say how deep and wide a network is, not which images it takes
    r"x*(tiny|small|base|large)|huge|giant|gigantic|little|medium|mediumd|betwixt|d?[dpw]wee|wee|intern300m|so\d+m2?|atto|femto|"
    r"pico|nano|zepto|mini|micro|x*[smlbhgtu]|x+l?|\d+[mb]|[smbltdahe]\d|b\d+|\d\d"
)


def families() -> dict[str, list[str]]:
    """Names by module of timm's, without those that are for tests."""
    found = {module: timm.list_models(module=module) for module in list_modules()}
    found = {module: [name for name in names if not name.startswith("test_")] for module, names in found.items()}
    return {module: names for module, names in sorted(found.items()) if names}


@contextmanager
def without_initialisation() -> Iterator[None]:
    """Draw no first weights: on the meta device there are none, but drawing takes most of the time."""
    drawn = re.compile(
        r"(trunc_|lecun_|kaiming_|xavier_)?(normal|uniform)_(tf_)?|(zeros|ones|constant)_|variance_scaling_"
    )
    with ExitStack() as stack:
        for module in [torch.nn.init, *(sys.modules[name] for name in list(sys.modules) if name.startswith("timm."))]:
            for name in filter(drawn.fullmatch, dir(module)):
                stack.enter_context(patch.object(module, name, lambda tensor, *_, **__: tensor))
        yield


def parameters(network: str) -> int:
    """Of a backbone; endless where timm cannot build it here."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in _backbone(network).parameters())
    except (ImportError, RuntimeError, TypeError):
        return sys.maxsize


def weight(network: str) -> tuple[int, int]:
    """kB of a backbone's tensors, and its features in front of a classifier."""
    with torch.device("meta"):
        backbone = _backbone(network)
    tensors = backbone.state_dict().values()
    return round(sum(t.numel() * t.element_size() for t in tensors) / 1000), int(backbone.head_hidden_size)


def smallest() -> dict[str, str]:
    """The network with the fewest parameters of each family, of those that have one below the largest."""
    with without_initialisation():
        found = {family: min((parameters(name), name) for name in names) for family, names in families().items()}
    return {family: name for family, (count, name) in found.items() if count < LARGEST}


def alike(names: list[str]) -> list[list[str]]:
    """Names of a family in groups that differ in depth and width alone, the shortest first."""
    groups = defaultdict(list)
    for name in names:
        first, *rest = name.split("_")
        groups[(first, *(part for part in rest if not _OF_SIZE.fullmatch(part)), own_size(name))].append(name)
    return sorted((sorted(group, key=lambda name: (len(name), name)) for group in groups.values()), key=len)[::-1]


def rule(network: str) -> dict[str, Any]:
    """Which sizes fit: a ``multiple`` of so many pixels, those ``above`` so many, or ``sizes`` (of `FINE`); all, where
    none of it is said. ``stride`` of the map: 0 where there is none, null where it is no number of pixels, 32 where
    it is not said."""
    own, made = own_size(network), {}
    for size in (own, *PROBED):
        made.setdefault(size, _made(network, size))
    fits, fails = ({size for size, found in made.items() if bool(found) is fit} for fit in (True, False))
    facts: dict[str, Any] = {}
    if fails:
        whole = [m for m in (2, 4, 8, 14, 16, 28, 32, 64) if fits == {size for size in made if size % m == 0}]
        if whole:
            facts = {"multiple": whole[0]}
        elif len(fits) > 1 and max(fails) < min(fits):
            facts = {"above": max(fails)}
        else:
            facts = {"sizes": sorted(fits.union(size for size in FINE if size not in made and _made(network, size)))}
    side = found.side if (found := made[own]) else 0
    if side == math.ceil(own / 32):
        return facts
    return facts | {"stride": side and (own // side if own % side == 0 else None)}


def sizes(cache: Path) -> None:
    """Ask one name of each family, then all of the families but those where it takes all sizes at a stride of 32;
    write the table. What the cache has is not asked again."""
    known = dict(map(json.loads, cache.read_text().splitlines())) if cache.exists() else {}
    groups = {family: alike(names) for family, names in families().items()}
    with cache.open("a") as file, without_initialisation():
        firsts = (family[0][0] for family in groups.values())
        others = (group[0] for family in groups.values() if known[family[0][0]] for group in family)
        for name in chain(firsts, others):
            if name not in known:
                known[name] = rule(name)
                file.write(json.dumps([name, known[name]]) + "\n")
                file.flush()
    TABLE.write_text(table(known, groups), encoding="utf-8")


def table(known: dict[str, dict[str, Any]], groups: dict[str, list[list[str]]]) -> str:
    """The JSON of sizes.json: names by what is known of them; others are not in it."""
    rules: dict[str, list[str]] = defaultdict(list)
    for family in groups.values():
        plain = known.get(family[0][0]) == {}
        for group in family:
            if plain or group[0] in known:
                rules[json.dumps({} if plain else known[group[0]])] += group
    lines = [f' {{"networks": {json.dumps(sorted(names))}, {facts[1:]}' for facts, names in sorted(rules.items())]
    return "[\n" + ",\n".join(lines).replace(", }", "}") + "\n]\n"


def works(network: str, size: int, name: str) -> str:
    """Forward, backward and a prediction of two images a side; empty where that works, else why not."""
    try:
        made = check_network(network, "", size)
        cells = next((n for n in range(2, made.side + 1) if made.side % n == size % n == 0), 2)
        options = {"dcl": {"parts": cells}, "lio": {"positives": 1}}.get(name, {})
        torch.manual_seed(0)
        model = Classifier(network, 3, crop=size)
        objective = build(name, options, Context(3, made.channels, size, 1, side=made.side))
        labels = torch.tensor([1, 1])
        batch = TrainBatch(torch.randn(2, 3, size, size), labels, labels, epoch=0, step=0, seed=0)
        torch.stack(list(objective(model.train(), batch).values())).sum().backward()
        norms = [p.grad.abs().sum() for p in model.backbone_parameters() if p.grad is not None]
        with torch.inference_mode():
            logits = model.eval()(batch.images)
        sound = len(norms) and bool(torch.stack(norms).sum() > 0) and bool(logits.isfinite().all())
        return "" if sound and logits.shape == (2, 3) else "no gradient, or a prediction that is not finite"
    except Refused as error:
        return f"{error.what} {error.advice}"
    except Exception as error:  # noqa: BLE001  a survey ends with no network
        return f"**{type(error).__name__}**: {str(error).splitlines()[0]}"


def exports(network: str, size: int) -> bool:
    """Whether `torch.export` makes a file of it that predicts as it does, two pictures and three."""
    config = Config(network, *normalisation(network), resize=size, crop=size)
    torch.manual_seed(0)
    feed = Feed(torch.device("cpu"), config.mean, config.std, config.interpolation)
    member = Ready(Classifier(network, 3, crop=size).eval(), config, Classes((0, 1, 2)), feed)
    whole = WholeModel(Recogniser((Voice(Path()),), (member,), "center", 3))
    pictures = [Image.effect_noise((size, size), sigma).convert("RGB") for sigma in (20, 60, 100)]
    try:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            answers = formats.write(Path(folder), whole, "torch")
            return all(
                torch.allclose(answers(pictures[:count]), whole(*whole.squared(pictures[:count])), atol=1e-4)
                for count in (2, 3)
            )
    except Exception:  # noqa: BLE001  a survey ends with no network
        return False


def survey(cache: Path) -> None:
    """Write the page; what the cache has is not tried again."""
    known = dict(map(json.loads, cache.read_text().splitlines())) if cache.exists() else {}
    with cache.open("a") as file:
        for family, network in smallest().items():
            if network not in known:
                sizes = {size: works(network, size, "cross_entropy") for size in sorted({*SIZES, own_size(network)})}
                fits = [size for size, why in sizes.items() if not why]
                dcl, lio = ("" in (works(network, size, name) for size in fits) for name in ("dcl", "lio"))
                known[network] = {"family": family, "millions": parameters(network) / 1e6, "own": own_size(network)}
                known[network] |= {"sizes": sizes, "dcl": dcl, "lio": lio, "export": exports(network, fits[0])}
                file.write(json.dumps([network, known[network]]) + "\n")
                file.flush()
    PAGE.write_text(page({name: json.loads(json.dumps(row)) for name, row in known.items()}), encoding="utf-8")


def page(rows: dict[str, dict[str, Any]]) -> str:
    """The Markdown of docs/networks.md."""
    lines, reasons = [], dict[str, str]()
    for network, row in sorted(rows.items(), key=lambda named: named[1]["family"]):
        at = ", ".join(size for size, why in row["sizes"].items() if not why) or "none"
        reasons |= {f"{network}, {size}": why for size, why in row["sizes"].items() if why}
        words = ["yes" if row[name] else "no" for name in ("dcl", "lio", "export")]
        cells = (row["family"], f"`{network}`", f"{row['millions']:.1f}", str(row["own"]), at, *words)
        lines.append(f"| {' | '.join(cells)} |")
    whole = [row for row in rows.values() if any(not why for why in row["sizes"].values())]
    at_all = sum(not any(row["sizes"].values()) for row in rows.values())
    maps = sum(row["dcl"] and row["lio"] for row in whole)
    tried = f"{len(rows)} of {len(families())} families have one: {len(whole)} of {len(rows)} train and predict"
    out = sum(row["export"] for row in whole)
    counts = f"{tried}, {at_all} of them at every size, {maps} also with DCL and LIO; {out} are exported (torch)."
    body = "\n".join(lines)
    why = "\n".join(
        f"- `{name.partition(',')[0]}` at{name.partition(',')[2]}: {text}" for name, text in reasons.items()
    )
    return f"{_HEAD.format(timm=timm.__version__, counts=counts)}{body}\n{_REFUSED}{why}\n"


_HEAD = """# Networks

Made by `python benchmarks/networks.py survey` with timm {timm}: of each family (module of `timm.models`) the network
with the fewest parameters, below 100 million, drawn anew, forward and backward on two images and a prediction, at 64,
96, 224 pixels and its own size; DCL, LIO and `export --to torch` at the smallest that goes. {counts}

Any other name of `timm.list_models()` may be tried: before a GPU is held, `aliprod run` asks the network itself whether
it takes the `crop` of each of its stages, and `aliprod plan` looks into `aliprod/plan/sizes.json`.

| family | network | million parameters | own size | trains and predicts at | DCL | LIO | export |
|---|---|---|---|---|---|---|---|
"""
_REFUSED = """
## What is refused
DCL and LIO look at places: a network without a map of features, or patch tokens that make one, is refused with them.

"""


def names(_cache: Path) -> None:
    """Write networks.txt: timm's version, then a line a network: name, kB of its weights and features in front of a
    classifier, tags of pretrained weights."""
    tags: dict[str, list[str]] = {name: [] for name in timm.list_models()}
    for name in timm.list_pretrained():
        architecture, _, tag = name.partition(".")
        tags[architecture].append(tag)
    with without_initialisation():
        rows = [" ".join([name, *map(str, weight(name)), *own]) for name, own in tags.items()]
    lines = [f"timm {timm.__version__}", *rows]
    NAMES.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Make one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["names", "sizes", "survey"])
    parser.add_argument("--cache", type=Path, default=Path("networks.jsonl"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    {"names": names, "sizes": sizes, "survey": survey}[options.command](options.cache)


if __name__ == "__main__":
    main()
