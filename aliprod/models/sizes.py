"""Which images a network takes, known without torch: a table that `benchmarks/networks.py sizes` makes.

Of a network that is not in it nothing is said: `classifier.check_network` asks the network itself.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any


def misfit(network: str, crop: int) -> str:
    """Why a network takes no images of ``crop`` x ``crop`` pixels, with sizes that it takes; empty where it does."""
    facts = _facts(network)
    if facts.get("sizes") == []:
        return f"{network} pools no features for a classifier: take another network"
    if "multiple" in facts:
        low = crop // facts["multiple"] * facts["multiple"]
        near = [] if low == crop else [low or facts["multiple"], low + facts["multiple"]]
    elif "above" in facts:
        near = [] if crop > facts["above"] else [facts["above"] + 32]
    else:
        asked = "sizes" in facts and crop % 16 == 0 and crop <= 512  # of others the table knows nothing
        unfit = asked and crop not in facts["sizes"]
        near = sorted(facts["sizes"], key=lambda size: abs(size - crop))[:3] if unfit else []
    fits = " or ".join(map(str, sorted(set(near))))
    return f"{network} takes no images of {crop} x {crop} pixels; crop = {fits} would fit" if fits else ""


def stride(network: str) -> int | None:
    """Pixels of a cell of a network's feature map, or of its patches; 0 where it makes no map, None where the table
    does not know."""
    facts = _facts(network)
    return facts.get("stride", 32) if facts else None


def _facts(network: str) -> dict[str, Any]:
    return _table().get(network.partition(".")[0], {})


@cache
def _table() -> dict[str, dict[str, Any]]:
    rules = json.loads((Path(__file__).parent / "networks.json").read_text(encoding="utf-8"))
    return {name: rule for rule in rules for name in rule["networks"]}
