"""What timm's networks are called and can do, without timm, which takes torch along.

networks.txt beside this file has timm's version, then a line a network: its name and what `Network` holds.
`python benchmarks/networks.py names` makes it anew of the timm that is installed.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from aliprod.errors import did_you_mean

FILE = Path(__file__).with_name("networks.txt")


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
