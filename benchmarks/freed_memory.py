"""A training step on a CPU where the memory that steps free is kept, as a Ray of our own has it, against glibc's way.

Each side is a process of its own, with one thread of torch, and trains in a thread beside the first, as Ray Train does.
CPU seconds of ten steps after two, peak memory, and whether both end with the same weights.

    python benchmarks/freed_memory.py [--rounds 5]
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from statistics import median

import timm
import torch
from ratio import Side, header, show
from torch.nn.functional import cross_entropy

from aliprod.processes import KEEPING

TRAININGS = (("tf_efficientnet_lite0", 160, 32), ("efficientnet_b3", 64, 16), ("resnet50", 64, 16))
WARM_UP, STEPS = 2, 10


def main() -> None:
    """Print a ratio for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.train:
        thread = threading.Thread(target=train, args=json.loads(asked.train))
        thread.start()
        thread.join()
        return
    print(header(("torch", "timm")))
    for training in TRAININGS:
        found = [[measured(training, kept) for kept in (KEEPING, {})] for _ in range(asked.rounds)]
        kept, freed = zip(*found, strict=True)
        if {weights for _, _, weights in (*kept, *freed)} != {kept[0][2]}:
            sys.exit(f"{training}: not the same weights")
        sides = [Side(name, tuple(cpu for cpu, _, _ in side)) for name, side in (("kept", kept), ("freed", freed))]
        show(f"{training[0]}, {training[2]} images of {training[1]} pixels", *sides, "ms a step", 1000 / STEPS)
        print("  peak: " + ", ".join(f"{median(peak for _, peak, _ in side):,.0f} MB" for side in (kept, freed)))


def measured(training: tuple[str, int, int], environment: dict[str, str]) -> tuple[float, int, str]:
    """CPU seconds, peak in MB and digest of the weights of a training in its own process."""
    command = [sys.executable, __file__, "--train", json.dumps(training)]
    cpu, peak, weights = json.loads(subprocess.check_output(command, env=os.environ | environment))
    return cpu, peak, weights


def train(network: str, size: int, batch: int) -> None:
    """Train on random pixels, and print what `measured` gives."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(network, num_classes=48).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(48, (batch,))
    for number in range(WARM_UP + STEPS):
        if number == WARM_UP:
            began = time.process_time()
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    cpu = time.process_time() - began
    weights = hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()
    print(json.dumps([cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, weights]))


if __name__ == "__main__":
    main()
