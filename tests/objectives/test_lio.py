"""LIO: pseudo masks of groups, polar targets, and the three losses of the model's batch."""

import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from aliprod.data.loader import Feed, TrainBatches
from aliprod.data.training_set import training_set
from aliprod.errors import Refused
from aliprod.models import weights
from aliprod.objectives import Context
from aliprod.objectives.lio import Objective, context_loss, extent_loss, losses, polar_targets, pseudo_mask
from aliprod.recipe import Stage
from aliprod.training.loop import train

TOLERANCES = pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float64, 0, 1e-10), (torch.float32, 1e-4, 1e-6)]
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@TOLERANCES
def test_extent_and_its_gradients_are_the_golden_ones(golden, dtype, rtol, atol):
    vectors = {name: value.to(dtype) for name, value in golden("lio_extent").items()}
    features, predicted = vectors["features"].requires_grad_(), vectors["predicted_mask"].requires_grad_()
    mask = pseudo_mask(features)
    value = extent_loss(predicted, mask)
    value.backward()
    found = {
        "pseudo_mask": mask,
        "loss": value,
        "grad_predicted_mask": predicted.grad,
        "grad_features_through_target": features.grad,
    }
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, vectors[name], rtol=rtol, atol=atol)
    assert (value - vectors["loss_if_misgrouped"]).abs() > 1e-3


@TOLERANCES
def test_context_and_its_gradients_are_the_golden_ones(golden, dtype, rtol, atol):
    vectors = {n: v.to(dtype) if v.is_floating_point() else v for n, v in golden("lio_context").items()}
    inputs = [vectors[name].requires_grad_() for name in ("features", "weight", "bias")]
    value = context_loss(inputs[0], vectors["mask"], *inputs[1:])
    value.backward()
    torch.testing.assert_close(value, vectors["loss"], rtol=rtol, atol=atol)
    for name, tensor in zip(("features", "weight", "bias"), inputs, strict=True):
        torch.testing.assert_close(tensor.grad, vectors[f"grad_{name}"], rtol=rtol, atol=atol)


def test_polar_targets_are_the_golden_ones_for_every_anchor(golden):
    vectors = golden("lio_context")
    for anchor, names in (
        (vectors["anchor"], ("distance", "angle")),
        (torch.arange(49), ("all_anchor_distance", "all_anchor_angle")),
    ):
        for found, name in zip(polar_targets(anchor, 7), names, strict=True):
            torch.testing.assert_close(found, vectors[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("published", [False, True])
@TOLERANCES
def test_totals_are_the_golden_ones(golden, published, dtype, rtol, atol):
    vectors = {n: v.to(dtype) if v.is_floating_point() else v for n, v in golden("lio_total").items()}
    found = losses(vectors["features"], vectors["labels"], vectors, published)
    main, positive = ((vectors[f"ce_{part}"], vectors[f"context_{part}"]) for part in ("main", "positive"))
    shares = (1, 1) if published else (1 / 4, 3 / 4)
    expected = {
        "class": shares[0] * main[0] + shares[1] * positive[0],
        "context": shares[0] * main[1] + shares[1] * positive[1],
        "extent": vectors["extent"],
        "total": vectors["total" if published else "total_grouped"],
    }
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize(("detach", "name"), [(True, "detached_target"), (False, "through_target")])
@TOLERANCES
def test_gradients_into_the_backbone_are_the_golden_ones(golden, detach, name, dtype, rtol, atol):
    vectors = {n: v.to(dtype) if v.is_floating_point() else v for n, v in golden("lio_total").items()}
    features = vectors["features"].requires_grad_()
    losses(features, vectors["labels"], vectors, published=True, detach_target=detach)["total"].backward()
    torch.testing.assert_close(features.grad, vectors[f"grad_features_{name}"], rtol=rtol, atol=atol)


def test_a_classifier_without_bias_is_one_with_a_bias_of_0(golden):
    vectors = golden("lio_total")
    without = {name: value for name, value in vectors.items() if name != "b_class"}
    zero = vectors | {"b_class": torch.zeros_like(vectors["b_class"])}
    found, expected = (losses(vectors["features"], vectors["labels"], heads) for heads in (without, zero))
    torch.testing.assert_close(found, expected)


@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_permuting_the_images_of_a_group_permutes_their_masks(images, side, seed):
    features = normal(2, images, 3, side, side, seed=seed)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(pseudo_mask(features[:, order]), pseudo_mask(features)[:, order])


def test_a_mask_is_the_mean_of_the_best_matches_with_the_other_images():
    features = normal(2, 3, 4, 2, 2)
    for group, image, cell in ((0, 0, 0), (1, 2, 3), (1, 1, 2)):
        query = features[group, image].flatten(1)[:, cell]
        best = [(query @ features[group, other].flatten(1) / 4).max() for other in range(3) if other != image]
        found = pseudo_mask(features)[group, image].flatten()[cell]
        torch.testing.assert_close(found, sum(best) / 2)


def test_mixing_two_classes_changes_the_masks():
    features = normal(2, 4, 3, 2, 2)
    mixed = features.clone()
    mixed[0, 3], mixed[1, 3] = features[1, 3], features[0, 3]
    assert (pseudo_mask(mixed) - pseudo_mask(features)).abs().max() > 1e-3


@given(st.integers(1, 9), st.data())
def test_distance_and_angle_point_from_the_anchor_to_the_cell(size, data):
    anchor = data.draw(st.integers(0, size * size - 1))
    distance, angle = (target[0] for target in polar_targets(torch.tensor([anchor]), size))
    direction = (2 * angle - 1) * math.pi
    cells = torch.arange(size * size)
    rows, columns = (cells // size - anchor // size) / size, (cells % size - anchor % size) / size
    torch.testing.assert_close((distance * direction.cos()).float(), rows)
    torch.testing.assert_close((distance * direction.sin()).float(), columns)
    assert angle[anchor] == 0.5
    assert ((angle > 0) & (angle <= 1)).all()


def test_features_of_all_zeros_have_an_anchor_and_no_nan():
    features = torch.zeros(2, 3, 4, 4, requires_grad=True)
    weight = torch.ones(2, 6, requires_grad=True)
    value = context_loss(features, normal(2, 4, 4, dtype=torch.float32), weight, torch.zeros(2))
    value.backward()
    assert value.isfinite()
    assert features.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_gradcheck():
    shapes = {
        "w_class": (4, 6), "w_structure": (3, 6, 1, 1), "b_structure": (3,),
        "w_mask": (1, 6, 1, 1), "b_mask": (1,), "w_polar": (2, 6), "b_polar": (2,),
    }  # fmt: skip
    heads = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes.values())]
    features = normal(1, 2, 6, 3, 3, seed=9).requires_grad_()

    def total(features, *heads):
        return losses(features, torch.tensor([2]), dict(zip(shapes, heads, strict=True)), detach_target=False)["total"]

    assert torch.autograd.gradcheck(total, (features, *heads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_features_from_half_precision_stay_finite_and_float32(golden, dtype):
    vectors = golden("lio_total")
    heads = {name: value.float() for name, value in vectors.items() if name.startswith(("w_", "b_"))}
    features = (10 * vectors["features"]).to(dtype).requires_grad_()
    parts = losses(features, vectors["labels"], heads, detach_target=False)
    parts["total"].backward()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in parts.values())
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("side", [8, 14])
def test_an_even_map_larger_than_7_is_averaged_two_by_two(golden, side):
    vectors = golden("lio_total")
    features = normal(2, 4, 8, side, side)
    halved = features.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).mean(dim=(4, 6))
    found, expected = (losses(maps, vectors["labels"], vectors) for maps in (features, halved))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("side", [1, 2, 6, 7, 9])
def test_a_small_or_odd_map_is_taken_as_it_is(golden, side):
    vectors = golden("lio_total")
    features = normal(2, 4, 8, side, side)
    predicted = torch.nn.functional.conv2d(features.flatten(0, 1).relu(), vectors["w_mask"], vectors["b_mask"])
    expected = extent_loss(predicted.view(2, 4, side, side), pseudo_mask(features))
    torch.testing.assert_close(losses(features, vectors["labels"], vectors)["extent"], expected)


@pytest.mark.parametrize("published", [False, True])
def test_the_objective_is_the_weighted_losses_of_the_batchs_groups(context, model, batch, published):
    objective = Objective(context, positives=1, published=published)
    features = model.features(batch.images).unflatten(0, (4, 2))
    heads = dict(objective.heads.items()) | {"w_class": model.classifier.weight}
    expected = losses(features, batch.labels[::2], heads, published)
    found = objective(model, batch)
    torch.testing.assert_close(sum(found.values()), expected["total"])
    torch.testing.assert_close(found["class"], expected["class"])
    torch.testing.assert_close(found["context"], 0.1 * expected["context"])
    torch.testing.assert_close(found["extent"], 0.1 * expected["extent"])


def test_a_group_is_the_main_image_and_its_positives(context):
    assert Objective(context).needs.group == 4
    assert Objective(context, positives=2).needs.group == 3
    with pytest.raises(Refused, match="positives"):
        Objective(context, positives=0)


def test_every_head_learns(context, model, batch):
    objective = Objective(context, positives=1)
    sum(objective(model, batch).values()).backward()
    assert all(head.grad.abs().sum() > 0 for head in objective.parameters())


def test_on_a_fixed_backbone_its_heads_learn_extent_and_context(context, model, batch):
    torch.manual_seed(0)
    objective = Objective(context, positives=1)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    first = objective(model, batch)
    for _ in range(100):
        optimizer.zero_grad()
        parts = objective(model, batch)
        sum(parts.values()).backward()
        optimizer.step()
    assert parts["extent"] < 0.5 * first["extent"]
    assert parts["context"] < first["context"]


def test_in_bf16_autocast_and_channels_last_the_losses_are_float32_and_near_those_of_float32(context, model, batch):
    objective = Objective(context, positives=1)
    expected = objective(model, batch)
    model = model.to(memory_format=torch.channels_last)
    last = type(batch)(batch.images.contiguous(memory_format=torch.channels_last), batch.labels, seed=batch.seed)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(model, last)
    sum(found.values()).backward()
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0.01)


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_group_on_every_rank_has_one_label(packages, context, world_size):
    objective, stage = Objective(context, positives=3), Stage(resize=8, crop=8, batch_size=16, shares=world_size)
    images = training_set(packages, stage)
    groups = []
    for rank in range(world_size):
        feed = Feed(torch.device("cpu"), (0.5,) * 3, (0.2,) * 3, "bilinear", rank, world_size)
        for epoch in (0, 1):
            for batch in TrainBatches(images, stage, feed, objective.needs.group).epoch(epoch):
                assert len(batch.labels) == 16 // world_size
                groups += batch.labels.unflatten(0, (-1, 4)).tolist()
    assert all(len(set(group)) == 1 for group in groups)
    assert len({group[0] for group in groups}) == packages.num_classes


@pytest.fixture
def as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("objective", [{"name": "lio"}, {"name": "dcl", "parts": 2}, "cross_entropy"])
def test_what_is_saved_after_training_is_the_plain_backbone_and_its_classifier(packages, objective, tmp_path):
    """Same names, same number: so the same module, and the same speed, whatever it was trained with."""
    stage = Stage(resize=64, crop=64, batch_size=16, objective=objective, precision="float32")
    *_, progress = train(stage, "test_resnet", packages)
    plain = timm.create_model("test_resnet", num_classes=0)
    expected = {f"backbone.{name}": value.shape for name, value in plain.state_dict().items()}
    expected["classifier.weight"] = (packages.num_classes, plain.num_features)
    assert {name: value.shape for name, value in progress.state.best.tensors.items()} == expected
    config = weights.Config("test_resnet", (0.5,) * 3, (0.2,) * 3, "bilinear", 64, 64)
    weights.save(tmp_path, progress.state.best.tensors, config, weights.Classes(tuple(packages.classes.tolist())))
    model, *_ = weights.load(tmp_path)
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    assert sum(p.numel() for p in model.parameters()) == parameters + packages.num_classes * plain.num_features
    assert [type(module) for module in model.backbone.modules()] == [type(module) for module in plain.modules()]


def test_one_global_seed_makes_the_same_heads():
    context = Context(num_classes=5, num_features=8, crop=64, epochs=1)
    torch.manual_seed(3)
    first = Objective(context).state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(value, first[name]) for name, value in Objective(context).state_dict().items())
