"""What timm's networks are called and can do, without timm, which takes torch along.

networks.txt beside this file has timm's version, then a line a network: its name, the tags of its pretrained weights.
`python benchmarks/networks.py names` makes it anew of the timm that is installed.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

from aliprod.errors import did_you_mean

FILE = Path(__file__).with_name("networks.txt")


@cache
def known() -> Mapping[str, tuple[str, ...]]:
    """The tags of each network's pretrained weights; {} where the timm that is installed is another than the list's."""
    first, *lines = FILE.read_text(encoding="utf-8").splitlines()
    if first != f"timm {version('timm')}":  # `run` asks timm itself
        return {}
    return {name: tuple(tags) for name, *tags in map(str.split, lines)}


def complaint(network: str) -> tuple[str, str]:
    """What is wrong with a network's name, and the nearest right one; two '' where nothing is."""
    names, (architecture, _, tag) = known(), network.partition(".")
    if not names or (architecture in names and (not tag or tag in names[architecture])):
        return "", ""
    what = "weights tagged" if architecture in names else "network"
    near = [f"{architecture}.{tag}" for tag in names.get(architecture, ())] or [*names, *_tagged(names)]
    return f'timm {version("timm")} has no {what} "{network[:128]}".', did_you_mean(network[:128], near)


def has_weights(network: str) -> bool:
    """Whether timm has pretrained weights for a network, as far as the list knows."""
    return bool(known().get(network.partition(".")[0], ("unknown",)))


def _tagged(names: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    return (f"{name}.{tag}" for name, tags in names.items() for tag in tags)
