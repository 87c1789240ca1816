"""A stage of a network with what it reads, and the machine that it is trained on."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from aliprod.recipe.settings import Frozen
from aliprod.recipe.stage import Stage


class Machine(Frozen):
    """How a rank of a job works, whatever it trains. None of it is part of a key."""

    cpus_per_worker: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPUs of a rank; also its number of threads. Without it what the nodes have for each GPU; 1 where "
        "there are none",
    )
    loader_processes: int = Field(
        0, ge=0, le=1024, description="processes of a rank that read images; 0: the rank reads them itself"
    )
    save_every_steps: int | None = Field(
        None, ge=1, description="steps between resume checkpoints; without it one an epoch"
    )
    save_seconds: float = Field(
        0.0, ge=0, description="an epoch that ends sooner than this after the last checkpoint goes without one"
    )
    exact: bool = Field(True, description="kernels that give the same bytes each time; false may be faster on GPUs")
    compile: bool = Field(
        False, description="compile the backbone (torch.compile): minutes at a job's start, then faster steps"
    )
    checkpointing: bool = Field(
        False,
        description="compute activations again on the way back: less memory, a third more time, the same bytes",
    )
    watchdog_seconds: float = Field(
        1800.0,
        ge=1,
        le=86_400,
        description="a step that takes longer is ended with all stacks in the log, and the job resumed; "
        "a start or a validation may take five times as long",
    )

    @property
    def threads(self) -> int:
        """CPUs of a rank; 1 where nobody has said or found out how many."""
        return self.cpus_per_worker or 1


@dataclass(frozen=True)
class Inputs:
    """What a job reads beside the catalogue.

    Attributes:
        start: weights folder of the parent job.
        pretrained: safetensors file of the backbone, in a stage without parent.
        soup: weights folders of the stages that it is a mean of.
        teachers: soft labels of its images, a folder a teacher.
        pseudo_labels: folder of labels of test images.
        kept: folder of the rows that are left where duplicates are filtered.
        features: folders of all training images' features and, where there are any, of those of val; (): computed.
    """

    start: Path | None = None
    pretrained: Path | None = None
    soup: tuple[Path, ...] = ()
    teachers: tuple[Path, ...] = ()
    pseudo_labels: Path | None = None
    kept: Path | None = None
    features: tuple[Path, ...] = ()


NO_INPUTS = Inputs()
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
