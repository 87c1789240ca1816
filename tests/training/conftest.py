"""A stage that trains in a second, and a path by which the processes that tests start find their modules."""

import multiprocessing
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

from aliprod.recipe import LearningRate, Stage

sys.path.append(str(Path(__file__).parent))
multiprocessing.set_forkserver_preload(["aliprod.training.job"])
forkserver.ensure_running()  # before a loader starts one that has imported less


@pytest.fixture(scope="session")
def stage() -> Stage:
    """12 steps: 3 epochs of 4 batches of the 32 training images."""
    lr = LearningRate(backbone=0.02, heads=0.1, warmup_epochs=1)
    return Stage(resize=40, crop=32, batch_size=8, epochs=3, lr=lr, precision="float32", ema=0.99)
