"""compile: a compiled backbone has the values and names of the plain one, and is compiled in the first epoch only."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

from aliprod.catalogue.catalogue import Catalogue
from aliprod.inference import predict
from aliprod.recipe import Machine, ObjectiveRecipe, Stage
from aliprod.training.loop import train

NETWORK = "test_resnet.r160_in1k"


@pytest.fixture(autouse=True)
def _no_cpp(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are captured, differentiated and guarded as ever; only the C++ compiler is left out, which takes minutes.
    Validation has whole passes, of 16, and a partial one."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs, **_: aot_eager(graph, inputs))
    monkeypatch.setitem(predict.BATCH, "center", 128)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore")  # of PyTorch about itself
@pytest.mark.parametrize(
    ("changes", "graphs"),
    [
        ({}, 3),  # training on 8; validation, of raw and averaged weights alike, on 16 and at last on 8
        ({"shares": 2}, 3),  # training on 4
        ({"objective": ObjectiveRecipe(name="dcl", parts=2), "crop": 64, "resize": 64}, 3),  # training on twice 8
    ],
    ids=["cross_entropy", "shares", "dcl"],
)
def test_a_compiled_job_has_a_graph_for_each_shape_none_after_its_first_epoch_and_the_weights_of_a_plain_one(
    packages: Catalogue, stage: Stage, changes: dict[str, object], graphs: int
) -> None:
    stage = stage.model_copy(update={"epochs": 2} | changes)
    catalogue = replace(packages, train=packages.train.take(range(20)))  # 2 steps: 4 images are left over
    assert len(catalogue.val) % 16
    epochs = train(stage, NETWORK, catalogue, machine=Machine(compile=True))
    first = next(epochs)
    assert first.place.environment()["compiled"] is True
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        (*_, last) = epochs
    (*_, plain) = train(stage, NETWORK, catalogue)
    assert last.last is not None
    assert plain.last is not None
    compiled = last.last.tensors
    assert list(compiled) == list(plain.last.tensors)
    for name, tensor in plain.last.tensors.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-5)
