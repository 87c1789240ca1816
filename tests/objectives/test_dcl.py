"""DCL: the law of the destruction, the jigsaw to the byte, the three losses, and the batch that the model sees."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from aliprod.errors import Refused
from aliprod.models.classifier import Classifier
from aliprod.objectives import Context
from aliprod.objectives.dcl import Objective, arranged, heads, jigsaw, location_targets, losses, shuffle, shuffles

SIZES = st.tuples(st.integers(1, 8), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_displacements_make_the_golden_arrangements(golden):
    vectors = golden("dcl_permutation")
    found = arranged(vectors["paper_row_noise"], vectors["paper_col_noise"])
    assert torch.equal(found, vectors["paper_source"].long())


def lines(parts: int, reach: int, images: int) -> dict[str, torch.Tensor]:
    """(images * N, N): the orders drawn for rows and for columns, read off whole destructions."""
    source = shuffles(images, parts, reach, draw(1))
    in_rows = source.sort(dim=1).values  # a column holds one cell of each row: sorted, rows stand where they were
    return {"rows": (in_rows % parts).flatten(0, 1), "columns": (source // parts).transpose(1, 2).flatten(0, 1)}


@pytest.mark.parametrize("direction", ["rows", "columns"])
@pytest.mark.parametrize(("parts", "reach"), [(4, 1), (7, 1), (7, 2)])
def test_lines_take_legal_orders_only_with_the_exact_marginals(golden, parts, reach, direction):
    vectors = golden("dcl_permutation")
    orders = lines(parts, reach, 30_000)[direction]
    legal = {tuple(order) for order in vectors[f"paper_legal_n{parts}_k{reach}"].tolist()}
    taken = {tuple(order) for order in orders.unique(dim=0).tolist()}
    assert taken <= legal
    assert len(taken) > 0.97 * len(legal)  # the rarest of the 399 comes once in a million lines
    for place, marginal in enumerate(vectors[f"paper_marginal_n{parts}_k{reach}"].T):
        counts, expected, possible = orders[:, place].bincount(minlength=parts), marginal * len(orders), marginal > 0
        assert (counts[~possible] == 0).all()
        statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
        assert statistic < chi2.ppf(1 - 1e-5, possible.sum().item() - 1)


@given(SIZES)
def test_every_cell_is_kept_and_moves_less_than_twice_the_reach(sizes):
    parts, reach, _, seed = sizes
    source = shuffle(parts, reach, draw(seed))
    assert source.dtype == torch.int64
    assert source.flatten().sort().values.tolist() == list(range(parts**2))
    places = torch.arange(parts)
    assert ((source // parts - places[:, None]).abs() < 2 * reach).all()
    assert ((source % parts - places).abs() < 2 * reach).all()


def test_one_image_is_drawn_as_the_first_of_many_and_each_image_for_itself():
    assert torch.equal(shuffle(7, 2, draw(3)), shuffles(1, 7, 2, draw(3))[0])
    assert len({tuple(source.flatten().tolist()) for source in shuffles(100, 7, 2, draw(3))}) == 100


@pytest.mark.parametrize("case", [0, 1])
def test_the_jigsaw_and_its_targets_are_the_golden_ones(golden, case):
    vectors = golden("dcl_jigsaw")
    source = vectors[f"source_{case}"]
    found = jigsaw(vectors[f"image_{case}"].permute(2, 0, 1), source)
    assert torch.equal(found, vectors[f"jigsaw_{case}"].permute(2, 0, 1))
    assert torch.equal(location_targets(source), vectors[f"target_{case}"])
    identity = torch.arange(source.numel()).view_as(source)
    assert torch.equal(location_targets(identity), vectors[f"identity_target_{case}"])


@given(SIZES, st.sampled_from([(), (3,), (2, 3)]), st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]))
def test_the_inverse_order_restores_the_image_bytes(sizes, leading, dtype):
    parts, reach, cell, seed = sizes
    image = torch.randint(256, (*leading, parts * cell, parts * (cell + 1)), generator=draw(seed)).to(dtype)
    source = shuffle(parts, reach, draw(seed))
    inverse = source.flatten().argsort().view(parts, parts)
    assert torch.equal(jigsaw(jigsaw(image, source), inverse), image)


@given(SIZES)
def test_targets_of_a_destructed_image_are_those_of_the_original_in_another_order(sizes):
    parts, reach, _, seed = sizes
    identity = torch.arange(parts**2).view(parts, parts)
    found = location_targets(shuffle(parts, reach, draw(seed)))
    assert torch.equal(found.sort().values, location_targets(identity))


@given(SIZES)
def test_a_cells_target_names_the_very_cell_whose_pixels_it_holds(sizes):
    """Where the public code guesses by mean colour; here even of a picture of one colour."""
    parts, reach, side, seed = sizes
    numbers = torch.arange(parts**2).view(parts, parts)
    image = numbers.repeat_interleave(side, 0).repeat_interleave(side, 1)
    source = shuffle(parts, reach, draw(seed))
    seen = jigsaw(image, source)[::side, ::side]
    named = location_targets(source) * parts**2 + parts**2 // 2
    assert named.round().long().view(parts, parts).tolist() == seen.tolist()


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 0, 1e-10), (torch.float32, 1e-4, 1e-6)])
def test_heads_losses_and_gradients_are_the_golden_ones(golden, dtype, rtol, atol):
    vectors = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in golden("dcl_losses").items()
    }
    names = ("features", "w_class", "w_swap", "w_location", "b_location")
    inputs = [vectors[name].requires_grad_() for name in names]
    found = dict(zip(("logits", "swap_logits", "location"), heads(*inputs), strict=True))
    parts = losses(*found.values(), *(vectors[name] for name in ("labels", "swap_labels", "targets")))
    found |= {f"loss_{name}": value for name, value in parts.items()}
    found["total_gamma1"] = sum(parts.values())
    found["total_gamma001"] = parts["class"] + parts["swap"] + 0.01 * parts["location"]
    found["total_gamma1"].backward()
    found |= {f"grad_{name}": value.grad for name, value in zip(names, inputs, strict=True)}
    for name, value in found.items():
        torch.testing.assert_close(value, vectors[name], rtol=rtol, atol=atol)


def test_gradcheck():
    generator = draw(0)
    shapes = (4, 3, 4, 4), (5, 3), (2, 3), (1, 3, 1, 1), (1,)
    inputs = [torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    targets = torch.rand(4, 4, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 0, 3, 3]), torch.tensor([1, 0, 1, 0]), targets
    assert torch.autograd.gradcheck(lambda *x: tuple(losses(*heads(*x, parts=2), *labels).values()), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_ten_thousand_from_half_precision_stay_finite_and_float32(dtype):
    logits = (1e4 * torch.tensor([[1, -1], [-1, 1]])).to(dtype).requires_grad_()
    parts = losses(logits, logits, logits.tanh(), torch.tensor([1, 1]), torch.tensor([1, 0]), torch.zeros(2, 2))
    sum(parts.values()).backward()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in parts.values())
    assert logits.grad.isfinite().all()


def test_the_model_sees_originals_and_their_copies_in_turn_and_the_losses_of_all_rows(context, model, batch):
    objective = Objective(context, parts=2, beta=0.5, gamma=0.25)
    found = objective(model, batch)
    sources = shuffles(len(batch.images), 2, 2, draw(batch.seed))
    rows, targets = [], []
    for image, source in zip(batch.images, sources, strict=True):
        rows += [image, jigsaw(image, source)]
        targets += [location_targets(torch.tensor([[0, 1], [2, 3]])), location_targets(source)]
    features = model.features(torch.stack(rows))
    weights = model.classifier.weight, objective.swap_weight, objective.location_weight, objective.location_bias
    labels = batch.labels.repeat_interleave(2), torch.tensor([1, 0] * len(batch.images)), torch.stack(targets)
    expected = losses(*heads(features, *weights, parts=2), *labels)
    torch.testing.assert_close(found["class"], expected["class"])
    torch.testing.assert_close(found["swap"], 0.5 * expected["swap"])
    torch.testing.assert_close(found["location"], 0.25 * expected["location"])


def test_one_seed_draws_one_destruction_whatever_the_global_generator_holds(context, model, batch):
    objective = Objective(context, parts=2)
    first = objective(model, batch)
    torch.manual_seed(99)
    assert all(torch.equal(value, first[name]) for name, value in objective(model, batch).items())


def test_the_location_loss_starts_at_the_mean_of_the_targets():
    context = Context(num_classes=3, num_features=2048, crop=224, epochs=1)
    torch.manual_seed(0)
    objective = Objective(context)
    features = torch.rand(2, 2048, 7, 7)
    class_weight = torch.zeros(3, 2048)
    weights = class_weight, objective.swap_weight, objective.location_weight, objective.location_bias
    targets = location_targets(torch.arange(49).view(7, 7)).expand(2, -1)
    parts = losses(*heads(features, *weights), torch.tensor([0, 0]), torch.tensor([1, 0]), targets)
    assert parts["location"].item() == pytest.approx(0.2499, abs=0.01)


def test_it_learns_to_tell_originals_from_destructed_images_and_where_cells_were(context, model, batch):
    torch.manual_seed(0)
    objective = Objective(context, parts=2)
    model = model.double()
    batch = type(batch)(batch.images.double(), batch.labels, seed=batch.seed)
    objective = objective.double()
    optimizer = torch.optim.Adam([*model.parameters(), *objective.parameters()], lr=0.01)
    first = objective(model, batch)
    for _ in range(60):
        optimizer.zero_grad()
        parts = objective(model, batch)
        sum(parts.values()).backward()
        optimizer.step()
    assert parts["class"] < 0.1 * first["class"]
    assert parts["swap"] < first["swap"]
    assert parts["location"] < 0.5 * first["location"]


def test_in_bf16_autocast_and_channels_last_the_losses_are_float32_and_near_those_of_float32(context, model, batch):
    objective = Objective(context, parts=2)
    expected = objective(model, batch)
    model = model.to(memory_format=torch.channels_last)
    last = type(batch)(batch.images.contiguous(memory_format=torch.channels_last), batch.labels, seed=batch.seed)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(model, last)
    sum(found.values()).backward()
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0.02, atol=0.01)


def test_channels_last_images_reach_the_model_channels_last(context, model, batch):
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    last = type(batch)(batch.images.contiguous(memory_format=torch.channels_last), batch.labels, seed=batch.seed)
    Objective(context, parts=2)(model, last)
    Objective(context, parts=2)(model, batch)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert seen[1].is_contiguous()
    assert torch.equal(*seen)


@pytest.mark.parametrize(("crop", "parts"), [(256, 7), (224, 5), (100, 2), (64, 4)])
def test_a_crop_that_does_not_fit_the_grid_is_refused_with_sizes_that_work(crop, parts):
    sizes = r"(\d+), (\d+), (\d+), \.\.\. works"
    with pytest.raises(Refused, match=sizes) as refusal:
        Objective(Context(num_classes=2, num_features=4, crop=crop, epochs=1), parts=parts)
    for size in re.search(sizes, str(refusal.value)).groups():
        Objective(Context(num_classes=2, num_features=4, crop=int(size), epochs=1), parts=parts)


@pytest.mark.parametrize("network", ["resnet10t", "efficientnet_lite0", "test_efficientnet"])
def test_any_backbone_of_stride_32_is_trained_whole(network, batch):
    torch.manual_seed(0)
    model = Classifier(network, num_classes=3)
    objective = Objective(Context(num_classes=3, num_features=model.num_features, crop=64, epochs=1), parts=2)
    images = torch.randn(2, 3, 64, 64)
    parts = objective(model, type(batch)(images, torch.tensor([0, 2])))
    sum(parts.values()).backward()
    for name, parameter in (*model.named_parameters(), *objective.named_parameters()):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_the_papers_grid_fits_448_and_224_where_a_cell_is_one_of_the_map():
    for crop, side in ((448, 14), (224, 7)):
        Objective(Context(num_classes=2, num_features=3, crop=crop, epochs=1), parts=7)
        weights = torch.zeros(5, 3), torch.zeros(2, 3), torch.ones(1, 3, 1, 1), torch.zeros(1)
        features = torch.rand(2, 3, side, side)
        cells = features.unflatten(3, (7, -1)).unflatten(2, (7, -1)).mean(dim=(3, 5))
        *_, locations = heads(features, *weights)
        torch.testing.assert_close(locations, cells.sum(1).flatten(1).tanh())


def test_maps_and_images_that_do_not_fit_are_refused():
    weights = torch.zeros(5, 3), torch.zeros(2, 3), torch.zeros(1, 3, 1, 1), torch.zeros(1)
    with pytest.raises(Refused, match="8x8"):
        heads(torch.zeros(2, 3, 8, 8), *weights)
    with pytest.raises(Refused, match="50x49"):
        jigsaw(torch.zeros(3, 50, 49), torch.arange(49).view(7, 7))


@pytest.mark.parametrize("option", [{"parts": 1}, {"reach": 0}, {"beta": -1.0}, {"gamma": -1.0}])
def test_options_out_of_range_are_refused(option):
    with pytest.raises(Refused, match=next(iter(option))):
        Objective(Context(num_classes=2, num_features=4, crop=448, epochs=1), **option)


def test_a_swap_head_of_classes_tells_each_class_in_both_forms(context, model, batch):
    torch.manual_seed(0)
    objective = Objective(context, parts=2, swap="classes")
    assert objective.swap_weight.shape == (2 * context.num_classes, context.num_features)
    with torch.no_grad():
        objective.swap_weight.zero_()
        assert objective(model, batch)["swap"] == pytest.approx(math.log(2 * context.num_classes), rel=1e-5)
    labels = batch.labels.repeat_interleave(2)
    expected = torch.stack([batch.labels, batch.labels + context.num_classes], dim=1).flatten()
    assert torch.equal(objective._swap_labels(labels), expected)
