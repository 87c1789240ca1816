"""A training job as data: what a process needs to run it, on whatever machine. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from aliprod.recipe import Machine, Stage


@dataclass(frozen=True)
class Inputs:
    """What a job reads beside the catalogue.

    Attributes:
        start: weights folder of the parent job.
        pretrained: safetensors file of the backbone, in a stage without parent.
        soup: weights folders of the stages that it is a mean of.
        teachers: soft labels of its images, a folder a teacher.
        pseudo_labels: folder of labels of test images.
        hashes: folder of hashes of all training images, where duplicates are filtered.
    """

    start: Path | None = None
    pretrained: Path | None = None
    soup: tuple[Path, ...] = ()
    teachers: tuple[Path, ...] = ()
    pseudo_labels: Path | None = None
    hashes: Path | None = None


NO_INPUTS, DEFAULT_MACHINE = Inputs(), Machine()


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
