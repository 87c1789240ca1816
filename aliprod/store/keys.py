"""The key of whatever is made: sha256 of the facts that it depends on."""

import hashlib
import json
from typing import Any


def canonical(facts: Any) -> str:
    """Plain JSON in one form: keys sorted, no white space, ASCII."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def key_of(facts: Any) -> str:
    """sha256 of facts in their canonical form, in hexadecimal."""
    return hashlib.sha256(canonical(facts).encode()).hexdigest()
