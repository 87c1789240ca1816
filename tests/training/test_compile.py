"""compile: a compiled backbone has the names of the plain one, and is compiled once for a job."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from aliprod.data.catalogue import Catalogue
from aliprod.recipe import Stage
from aliprod.training.loop import train

NETWORK = "test_resnet.r160_in1k"


@pytest.fixture(autouse=True)
def _graphs_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are captured and guarded as ever; what a C++ compiler would make of them in minutes is left out."""

    def as_it_is(graph: torch.fx.GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", as_it_is)
    yield
    torch._dynamo.reset()
    counters.clear()
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore")  # of PyTorch about itself
def test_a_compiled_job_is_compiled_in_its_first_epoch_only_and_ends_with_the_names_of_a_plain_one(
    packages: Catalogue, stage: Stage
) -> None:
    graphs = []
    for progress in train(stage, NETWORK, packages, compiles=True):
        graphs.append(counters["stats"]["unique_graphs"])
        assert progress.end is not None
        compiled = progress.end.last.tensors
    assert graphs[0] > 0
    assert graphs == [graphs[0]] * stage.epochs
    assert progress.place.environment()["compiled"] is True
    (*_, plain) = train(stage, NETWORK, packages)
    assert plain.end is not None
    assert list(compiled) == list(plain.end.last.tensors)
    for name, tensor in plain.end.last.tensors.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-4)
