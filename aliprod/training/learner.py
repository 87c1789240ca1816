"""Model and objective as one module, on its device."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from aliprod.catalogue.catalogue import Catalogue, Integers
from aliprod.data.loader import Feed, TrainBatches
from aliprod.data.training_set import TrainingSet, training_set
from aliprod.errors import Refused
from aliprod.inference.metrics import mean_class_error
from aliprod.inference.predict import BATCH, autocast, of_features, own_device, precision, predict
from aliprod.models.classifier import Classifier, normalisation
from aliprod.objectives import Batch, Context, build
from aliprod.randomness import seed_of
from aliprod.recipe import DEFAULT_MACHINE, Machine, Stage
from aliprod.recipe.options import needs
from aliprod.store import lineage
from aliprod.store.epochs import TOP1
from aliprod.training.graphs import replay_passes
from aliprod.training.shares import ShareMean


@dataclass(frozen=True)
class Place:
    """Where a rank runs: its bytes depend on it, besides the plan."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    machine: Machine = DEFAULT_MACHINE

    def environment(self) -> dict[str, Any]:
        """The facts that equal bytes depend on; stands in the commit record."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "aliprod": lineage.software(),
            "torch": torch.__version__,
            "device": name,
            "threads": self.machine.threads,
            "compiled": self.machine.compile,
            "exact": self.machine.exact,
        }


def place(machine: Machine) -> Place:
    """This process's place: its GPU where there is one, its rank where a process group is up. Sets the threads (sums
    differ with them), where ``exact`` kernels that give the same bytes each time, and on a CPU that freed memory is
    kept."""
    torch.set_num_threads(machine.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if machine.compile:
        torch.use_deterministic_algorithms(machine.exact, warn_only=True)
    else:  # the same without the compiler's part, which takes a second to import
        torch.set_deterministic_debug_mode("warn" if machine.exact else "default")
    # nothing here reads memory that it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not machine.exact
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Place(own_device(), rank, world_size, machine)


class Learner(nn.Module):
    """The module that is trained: a classifier and the auxiliary heads of its objective.

    ``class_counts``: (K,) of the images that it is trained on; None: of all training images. ``dtype``: in which the
    forward pass runs (autocast); weights, losses and sums stay float32.
    """

    def __init__(
        self, stage: Stage, network: str, catalogue: Catalogue, place: Place, class_counts: Integers | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(seed_of(stage.seed, "init", network))
        self.stage, self.place = stage, place
        self.dtype = precision(place.device, stage.precision)
        self.needs = needs(stage.objective.name, stage.objective.options)
        counts = catalogue.class_counts if class_counts is None else class_counts
        self.model = Classifier(
            network,
            catalogue.num_classes,
            self.needs,
            crop=stage.crop,
            drop_rate=stage.drop_rate,
            drop_path_rate=stage.drop_path_rate,
            zero_init_last=stage.zero_init_last,
            bank=int(counts.sum()) if stage.neighbours else 0,
        )
        if stage.trains != "all":
            _freeze(self.model, but_norms=stage.trains == "norms")
        if place.machine.checkpointing:
            _checkpoint_blocks(self.model)
        context = Context(
            num_classes=catalogue.num_classes,
            num_features=self.model.num_features,
            crop=stage.crop,
            side=self.model.side,
            epochs=stage.epochs,
            class_counts=torch.from_numpy(counts),
            ancestor=None if catalogue.ancestor is None else torch.from_numpy(catalogue.ancestor),
        )
        self.objective = build(stage.objective.name, stage.objective.options, context)
        self.to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if stage.features == "cached":  # it is shown what its backbone would make
            as_it_is: Any = lambda features, pre_logits=True: features  # noqa: ARG005, E731
            self.model.backbone.forward_features = self.model.backbone.forward_head = as_it_is
        elif place.machine.compile:
            # In place, so that names of weights stay. Never with dynamic shapes: whether a graph gets them depends
            # on what was seen before, and a resumed job has seen less.
            features = torch.compile(self.model.backbone.forward_features, dynamic=False)  # type: ignore[arg-type]
            self.model.backbone.forward_features = features  # type: ignore[assignment]
        elif place.device.type == "cuda" and stage.trains != "classifier" and not place.machine.checkpointing:
            replay_passes(self.model.backbone)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted loss parts of a batch, each a scalar."""
        torch.default_generator.manual_seed(batch.seed)  # torch.manual_seed would visit all kinds of devices
        if self.place.device.type == "cuda":
            torch.cuda.manual_seed(batch.seed)
        with autocast(self.place.device, self.dtype):
            parts: dict[str, Tensor] = self.objective(self.model, batch)
        return parts

    def train(self, mode: bool = True) -> "Learner":
        """Set the mode of all modules; a backbone that is not trained, and norms whose statistics are frozen, stay as
        they are at inference."""
        super().train(mode)
        if self.stage.norm_statistics == "frozen":
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        if self.stage.trains == "classifier":
            self.model.backbone.eval()
            self.model.branches.eval()
        return self

    def trained(self) -> Iterator[nn.Parameter]:
        """Parameters that the gradient moves."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the classifier and of the objective."""
        return chain(self.model.classifier.parameters(), self.objective.parameters())


@dataclass(frozen=True)
class Setup:
    """A stage in its place: the learner, the batches that it is shown, and the images that score it. ``between`` is
    called now and then while an epoch is scored, as often on each rank; it may raise."""

    learner: Learner
    catalogue: Catalogue
    feed: Feed
    batches: TrainBatches
    between: Callable[[], None] = lambda: None

    def share_mean(self, trained: Iterable[nn.Parameter] = ()) -> ShareMean:
        """What takes the mean of a step's shares: of norm statistics, losses, and the gradients of ``trained``."""
        stage, ranks = self.learner.stage, self.learner.place.world_size
        moves = self.learner if stage.norm_statistics == "batch" else self.learner.objective
        sent = stage.gradients if stage.shares == "ranks" else "tree"
        return ShareMean(moves, trained, self.batches.shares, ranks, sent)

    def of_val(self) -> Iterator[tuple[np.ndarray, Tensor]]:
        """What the learner's weights, in eval mode, make of val by the centre crop: as `predict` yields it."""
        model, known = self.learner.model, self.batches.data.val_features
        if known is not None:
            return of_features(model, known, self.feed)
        return predict(model, self.catalogue.val, *self.learner.stage.test_view, "center", self.feed)

    def top1_errors(self) -> dict[str, float]:
        """How well the learner's weights know val, by the centre crop; empty without validation images: top-1 and
        top-5 error, means over classes; top-1 error per image; the loss (cross entropy), a mean over images."""
        model, feed, num_classes = self.learner.model, self.feed, self.catalogue.num_classes
        if not len(self.catalogue.val):
            return {}
        was_training = model.training
        model.eval()
        labels = torch.from_numpy(self.catalogue.val.labels)
        scores = torch.zeros(3, len(labels), dtype=torch.float64)  # class, classes above the label, loss
        blocks = self.of_val()
        for _ in range(0, len(labels), BATCH["center"] * feed.world_size):
            self.between()
            for rows, probabilities in islice(blocks, 1):  # the last may be another rank's
                own = probabilities.gather(1, labels[rows, None])
                above, loss = (probabilities > own).sum(dim=1), -own.clamp(min=torch.finfo(own.dtype).tiny).log()[:, 0]
                scores[:, rows] = torch.stack([probabilities.argmax(dim=1).double(), above.double(), loss.double()])
        self.learner.train(was_training)
        everywhere = scores.to(feed.device)
        if feed.world_size > 1:
            dist.all_reduce(everywhere)  # each rank filled its own rows, the others are zero
        predicted, ranks, losses = everywhere.cpu()
        in_five = torch.where(ranks < 5, labels, predicted.long())
        return {
            TOP1: float(mean_class_error(labels, predicted.long(), num_classes)),
            "val/top1_error_per_image": float((labels != predicted).double().mean()),
            "val/top5_error": float(mean_class_error(labels, in_five, num_classes)),
            "val/loss": float(losses.mean()),
        }


def set_up(
    stage: Stage, network: str, catalogue: Catalogue, machine: Machine, data: TrainingSet | None = None
) -> Setup:
    """Take this process's `place` and build there what a stage needs of timm's ``network``. ``data``: the images of the
    stage; None: those of the catalogue, no more."""
    where, data = place(machine), data or training_set(catalogue, stage)
    counts = np.bincount(data.images.labels, minlength=catalogue.num_classes)
    learner = Learner(stage, network, catalogue, where, counts)
    ranks = (where.rank, where.world_size, machine.loader_processes)
    feed = Feed(where.device, *normalisation(network), *ranks, learner.dtype)
    batches = TrainBatches(data, stage, feed, learner.needs.group, learner.needs.second)
    return Setup(learner, catalogue, feed, batches)


def _freeze(model: Classifier, but_norms: bool) -> None:
    """Have the gradient move the classifier alone, or the norm layers too."""
    norms = [module for module in model.modules() if but_norms and "Norm" in type(module).__name__]
    kept = {parameter for module in norms for parameter in module.parameters(recurse=False)}
    for parameter in model.backbone_parameters():
        parameter.requires_grad_(parameter in kept)


def _checkpoint_blocks(model: Classifier) -> None:
    """Have the backbone compute its activations again on the way back. Refused: timm cannot do it in this network."""
    try:
        model.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError) as error:
        advice = "Leave it out, or take a smaller batch, or more shares."
        raise Refused(
            "has no blocks that can be computed again: [cluster] checkpointing", model.network, advice
        ) from error
