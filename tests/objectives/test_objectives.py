"""A name in a plan becomes an objective, or a refusal with the nearest right name."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aliprod.errors import Refused
from aliprod.objectives import Context, build, reduced
from aliprod.recipe import Needs, options

NAMES = options.names()
OPTIONS = {"dcl": {"parts": 2}, "lio": {"positives": 1}}


def given(batch, needs, context):
    """A batch with what an objective needs."""
    second = replace(batch, images=batch.images.flip(0), labels=batch.labels.flip(0)) if needs.second else None
    teacher = torch.full((len(batch.labels), context.num_classes), 1 / context.num_classes) if needs.teacher else None
    return replace(batch, second=second, teacher=teacher, epoch=1)


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_trains_backbone_classifier_and_its_own_heads(name, context, model_for, batch):
    objective, needs = build(name, OPTIONS.get(name, {}), context), options.needs(name, OPTIONS.get(name, {}))
    assert needs.group == (2 if name == "lio" else 1)
    model = model_for(needs)
    parts = objective(model, given(batch, needs, context))
    assert all(part.shape == () and part.dtype == torch.float32 for part in parts.values())
    sum(parts.values()).backward()
    for parameter in (*model.parameters(), *objective.parameters()):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_counts_in_the_class_loss_alone(name, context, model_for, batch):
    """Doubled weights double what hangs on labels, and nothing else."""
    objective, needs = build(name, OPTIONS.get(name, {}), context), options.needs(name, OPTIONS.get(name, {}))
    model, batch = model_for(needs), given(batch, needs, context)
    parts = []
    for weights in (None, torch.ones(8), torch.full((8,), 2.0)):
        torch.manual_seed(5)  # mixup draws
        parts.append(objective(model, replace(batch, weights=weights)))
    free = {"swap", "location", "context", "extent", "reversed"}
    for part, value in parts[0].items():
        torch.testing.assert_close(parts[1][part], value)
        torch.testing.assert_close(parts[2][part], value if part in free else 2 * value)


@pytest.mark.parametrize(
    ("name", "given"),
    [*((name, OPTIONS.get(name, {})) for name in NAMES), ("lio", {"positives": 5}), ("arcface", {"centres": 3})],
)
def test_the_needs_of_an_objective_are_read_from_its_source_as_they_are_set(name, given, context):
    assert options.needs(name, given) == getattr(build(name, given, context), "needs", Needs())


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_drawn_from_torchs_global_generator_alone(name, context):
    torch.manual_seed(3)
    first = build(name, OPTIONS.get(name, {}), context).state_dict()
    torch.manual_seed(3)
    again = build(name, OPTIONS.get(name, {}), context).state_dict()
    assert all(torch.equal(value, first[head]) for head, value in again.items())


@pytest.mark.parametrize(
    ("name", "advice"),
    [("acuracy", "Did you mean accuracy"), ("nothing_like_it", "cross_entropy"), ("my_package.none", "PYTHONPATH")],
)
def test_an_unknown_name_is_refused_with_what_there_is(name, advice, context):
    with pytest.raises(Refused, match=name) as refusal:
        build(name, {}, context)
    assert advice in refusal.value.advice


def test_a_module_of_functions_alone_is_refused(context):
    with pytest.raises(Refused, match="no class Objective"):
        build("aliprod.randomness", {}, context)


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
