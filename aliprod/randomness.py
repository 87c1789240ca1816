"""Randomness is a function, not a state: whatever is drawn is a function of what it is drawn for."""

import hashlib


def seed_of(*parts: int | str) -> int:
    """A 32-bit seed from any numbers and names, the same on every machine and in every process.

    32 bits, since torch's CPU generator ignores the higher ones; blake2b, since Python's hash() is salted.
    """
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")
