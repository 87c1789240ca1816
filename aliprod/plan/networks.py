"""What timm's networks are called and can do, without timm, which takes torch along.

networks.txt beside this file has timm's version, then a line a network: its name and what `Network` holds; sizes.json
which images networks take, by rule. `python benchmarks/networks.py names` and `sizes` make them anew of the timm that
is installed. Of a network that is not in sizes.json nothing is said: `classifier.check_network` asks the network.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from aliprod.errors import did_you_mean

FILE, SIZES = (Path(__file__).with_name(name) for name in ("networks.txt", "sizes.json"))


class Network(NamedTuple):
    """A network of the list."""

    kilobytes: float  # of its weights in float32, without a classifier
    features: float  # in front of a classifier
    tags: tuple[str, ...]  # of its pretrained weights


@cache
def known() -> Mapping[str, Network]:
    """The networks by name; {} where the timm that is installed is another than the list's."""
    first, *lines = FILE.read_text(encoding="utf-8").splitlines()
    if first != f"timm {version('timm')}":  # `run` asks timm itself
        return {}
    rows = map(str.split, lines)
    return {name: Network(int(size), int(features), tuple(tags)) for name, size, features, *tags in rows}


def facts(network: str) -> Network | None:
    """What the list says of a network, with or without a tag; None where it is not in it."""
    return known().get(network.partition(".")[0])


def complaint(network: str) -> tuple[str, str]:
    """What is wrong with a network's name, and the nearest right one; two '' where nothing is."""
    names, (architecture, _, tag) = known(), network.partition(".")
    found = facts(network)
    if not names or (found and (not tag or tag in found.tags)):
        return "", ""
    what = "weights tagged" if found else "network"
    near = list(_tagged({architecture: found})) if found else [*names, *_tagged(names)]
    return f'timm {version("timm")} has no {what} "{network[:128]}".', did_you_mean(network[:128], near)


def _tagged(names: Mapping[str, Network]) -> Iterator[str]:
    return (f"{name}.{tag}" for name, found in names.items() for tag in found.tags)


def misfit(network: str, crop: int) -> str:
    """Why a network takes no images of ``crop`` x ``crop`` pixels, with sizes that it takes; empty where it does."""
    rule = _rule(network)
    if rule.get("sizes") == []:
        return f"{network} pools no features for a classifier: take another network"
    if "multiple" in rule:
        low = crop // rule["multiple"] * rule["multiple"]
        near = [] if low == crop else [low or rule["multiple"], low + rule["multiple"]]
    elif "above" in rule:
        near = [] if crop > rule["above"] else [rule["above"] + 32]
    else:
        asked = "sizes" in rule and crop % 16 == 0 and crop <= 512  # of others the table knows nothing
        unfit = asked and crop not in rule["sizes"]
        near = sorted(rule["sizes"], key=lambda size: abs(size - crop))[:3] if unfit else []
    fits = " or ".join(map(str, sorted(set(near))))
    return f"{network} takes no images of {crop} x {crop} pixels; crop = {fits} would fit" if fits else ""


def stride(network: str) -> int | None:
    """Pixels of a cell of a network's feature map, or of its patches; 0 where it makes no map, None where the table
    does not know."""
    rule = _rule(network)
    return rule.get("stride", 32) if rule else None


def _rule(network: str) -> dict[str, Any]:
    return _rules().get(network.partition(".")[0], {})


@cache
def _rules() -> dict[str, dict[str, Any]]:
    return {name: rule for rule in json.loads(SIZES.read_text(encoding="utf-8")) for name in rule["networks"]}
