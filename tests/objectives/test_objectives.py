"""A name in a plan becomes an objective, or a refusal with the nearest right name."""

import sys
from pathlib import Path

import pytest
import torch

from aliprod.errors import Refused
from aliprod.objectives import Context, build, reduced

NAMES = ["accuracy", "bi_tempered", "cross_entropy", "dcl", "focal", "hierarchy", "lio", "logit_adjustment"]


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_trains_backbone_classifier_and_its_own_heads(name, context, model, batch):
    options = {"dcl": {"parts": 2}, "lio": {"positives": 1}}.get(name, {})
    objective = build(name, options, context)
    assert objective.group == (2 if name == "lio" else 1)
    parts = objective(model, batch)
    assert all(part.shape == () and part.dtype == torch.float32 for part in parts.values())
    sum(parts.values()).backward()
    for parameter in (*model.parameters(), *objective.parameters()):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_drawn_from_torchs_global_generator_alone(name, context):
    options = {"parts": 2} if name == "dcl" else {}
    torch.manual_seed(3)
    first = build(name, options, context).state_dict()
    torch.manual_seed(3)
    again = build(name, options, context).state_dict()
    assert all(torch.equal(value, first[head]) for head, value in again.items())


@pytest.mark.parametrize(
    ("name", "advice"),
    [("acuracy", "Did you mean accuracy"), ("nothing_like_it", "cross_entropy"), ("my_package.none", "PYTHONPATH")],
)
def test_an_unknown_name_is_refused_with_what_there_is(name, advice, context):
    with pytest.raises(Refused, match=name) as refusal:
        build(name, {}, context)
    assert advice in refusal.value.advice


def test_a_file_of_functions_alone_is_refused(context):
    with pytest.raises(Refused, match="no class Objective"):
        build("bbn", {}, context)


def test_an_unknown_option_is_refused_with_the_nearest(context):
    with pytest.raises(Refused, match="Did you mean smoothing"):
        build("cross_entropy", {"smothing": 0.1}, context)
    with pytest.raises(Refused, match="none"):
        build("accuracy", {"smoothing": 0.1}, context)


def test_a_users_own_module_is_found_by_its_dotted_name(tmp_path: Path, monkeypatch, context, model, batch):
    package = tmp_path / "margins_of_mine"
    package.mkdir()
    (package / "wide.py").write_text(
        "import torch\n"
        "class Objective(torch.nn.Module):\n"
        "    def __init__(self, context, *, scale: float = 1.0):\n"
        "        super().__init__()\n"
        "        self.scale = scale / context.num_classes\n"
        "    def forward(self, model, batch):\n"
        "        return {'wide': self.scale * model(batch.images).square().sum()}\n"
    )
    (package / "bare.py").write_text(
        "import torch\n"
        "class Objective(torch.nn.Module):\n"
        "    def forward(self, model, batch):\n"
        "        return {'bare': model(batch.images).square().sum()}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    wide, bare = build("margins_of_mine.wide", {"scale": 3.0}, context), build("margins_of_mine.bare", {}, context)
    for name in [name for name in sys.modules if name.startswith("margins_of_mine")]:
        del sys.modules[name]
    assert wide.group == bare.group == 1
    torch.testing.assert_close(wide(model, batch)["wide"], 3 / 5 * bare(model, batch)["bare"])


def test_reduced_takes_the_mean_or_nothing():
    values = torch.tensor([1.0, 2.0, 6.0])
    assert reduced(values, "mean").item() == 3
    assert reduced(values, "none") is values
    with pytest.raises(Refused, match="sum"):
        reduced(values, "sum")


def test_a_context_needs_neither_counts_nor_a_tree(batch, model):
    plain = Context(num_classes=5, num_features=8, crop=64, epochs=3)
    assert build("cross_entropy", {}, plain)(model, batch)["cross_entropy"].isfinite()
