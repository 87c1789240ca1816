"""How long until a command answers that loads nothing heavy, against Python with pydantic alone?

python benchmarks/doors.py [--rounds 5]
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ratio import alternate, header

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "--help": ["--help"],
    "run typo.toml": ["run", "typo.toml"],
    "predict nonsense photo.jpg": ["predict", "nonsense", "photo.jpg"],
    "plan jobs/aliproducts.toml": ["plan", "jobs/aliproducts.toml"],
}


def start(*arguments: str) -> Callable[[], object]:
    """A run of Python with these arguments, its output thrown away."""
    return lambda: subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False)


def main() -> None:
    """Print the wall seconds of each command, and how many times those of the bare side they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(header())
    sides = {"import pydantic": start("-c", "import pydantic.main")}
    sides |= {name: start("-m", "aliprod", *arguments) for name, arguments in COMMANDS.items()}
    bare, *others = alternate(sides, rounds, time.perf_counter)
    for side in (bare, *others):
        print(f"{side.name:<28} {side.median:.2f} s, {side.median / bare.median:.1f} times")


if __name__ == "__main__":
    main()
