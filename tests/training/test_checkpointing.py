"""Activations that are computed again: less memory, the same bytes."""

import pytest
import torch

from aliprod.catalogue.catalogue import Catalogue
from aliprod.data.loader import TrainBatch
from aliprod.errors import Refused
from aliprod.recipe import Machine, ObjectiveRecipe, Stage
from aliprod.training.learner import Learner, Place
from aliprod.training.loop import train

STAGE = Stage(resize=40, crop=32, batch_size=8, epochs=2, shares=2, drop_rate=0.1)
DCL = ObjectiveRecipe(name="dcl", parts=2)


@pytest.mark.parametrize(
    ("network", "changes"),
    [("test_resnet", {}), ("test_efficientnet", {"drop_path_rate": 0.2}), ("test_vit", {"objective": DCL})],
)
def test_no_byte_depends_on_it(packages: Catalogue, network: str, changes: dict[str, object]) -> None:
    """Norm statistics, dropout and stochastic depth included."""
    stage = STAGE.model_copy(update=changes)
    lasts = [[*train(stage, network, packages, machine=Machine(checkpointing=on))][-1].last for on in (False, True)]
    plain, again = (last.tensors for last in lasts if last is not None)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_less_is_kept_for_the_way_back(packages: Catalogue) -> None:
    kept = {}
    for on in (False, True):
        learner = Learner(STAGE, "test_vit2", packages, Place(torch.device("cpu"), machine=Machine(checkpointing=on)))
        sizes: list[int] = []
        labels = torch.zeros(8, dtype=torch.int64)
        batch = TrainBatch(torch.zeros(8, 3, 32, 32), labels, labels, epoch=0, step=0, seed=0)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, of=sizes: of.append(x.nbytes) or x, lambda x: x):
            learner.train()(batch)
        kept[on] = sum(sizes)
    assert kept[True] < kept[False] / 2


def test_a_network_that_cannot_is_refused(packages: Catalogue) -> None:
    machine = Machine(checkpointing=True)
    with pytest.raises(Refused, match="checkpointing"):
        next(train(STAGE, "selecsls42", packages, machine=machine))
