"""A training job as data: what a process needs to run it, on whatever machine. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from aliprod.recipe import NO_INPUTS, Inputs, Machine, Stage

DEFAULT_MACHINE = Machine()


def never() -> bool:
    """No: nobody tells this job to stop."""
    return False


@dataclass(frozen=True)
class TrainingJob:
    """A stage of a network, with its inputs and the machine that it is trained on.

    Attributes:
        network: timm's name.
        folder: the job's, in the storage path.
    """

    name: str
    key: str
    network: str
    stage: Stage
    folder: Path
    inputs: Inputs = NO_INPUTS
    machine: Machine = DEFAULT_MACHINE


def without_training(machine: Machine) -> Machine:
    """The machine for work that trains nothing: exact kernels, nothing compiled."""
    return machine.model_copy(update={"exact": True, "compile": False})
