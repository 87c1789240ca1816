"""classifier: the seed's backbones as feature maps, and a head without bias."""

import pytest
import timm
import torch
from torch import nn

from aliprod.errors import Refused
from aliprod.models.classifier import Classifier, branched, check_network, normalisation
from aliprod.recipe import Needs

# methods.md, the table of backbones: features, and parameters in millions with a head of 50,030 classes.
BACKBONES = {
    "resnet50.tv_in1k": (2048, 126.0),
    "seresnext50_32x4d.racm_in1k": (2048, 128.0),
    "legacy_seresnet101.in1k": (2048, 149.8),
    "efficientnet_b3.ra2_in1k": (1536, 87.6),
    "efficientnet_b4.ra2_in1k": (1792, 107.3),
}


@pytest.mark.parametrize(("network", "features", "millions"), [(name, *row) for name, row in BACKBONES.items()])
def test_a_backbone_of_the_seed_maps_images_to_features_at_a_stride_of_32(
    network: str, features: int, millions: float
) -> None:
    zeroed = network.startswith("legacy")
    model = Classifier(network, num_classes=10, zero_init_last=zeroed).eval()
    with torch.inference_mode():
        mapped = model.features(torch.zeros(2, 3, 96, 64))
        assert mapped.shape == (2, features, 3, 2)
        assert model.classify(mapped).shape == (2, 10)
    assert model.num_features == features
    parameters = sum(p.numel() for p in model.parameters()) + (50_030 - 10) * features
    assert (parameters + 50_030) / 1e6 == pytest.approx(millions, abs=0.051)  # the table's heads have a bias
    if zeroed:
        norms = [getattr(module, "bn3", None) for module in model.backbone.modules()]
        last = [norm for norm in norms if isinstance(norm, nn.BatchNorm2d)]
        assert len(last) == 3 + 4 + 23 + 3  # the bottlenecks of a ResNet-101
        assert all(not norm.weight.any() for norm in last)


def test_the_classifier_is_a_product_with_the_pooled_features_and_has_no_bias() -> None:
    torch.manual_seed(0)
    model = Classifier("test_resnet", num_classes=7).eval()
    features = torch.randn(3, model.num_features, 2, 5)
    weight = dict(model.named_parameters())["classifier.weight"]
    torch.testing.assert_close(model.classify(features), features.flatten(2).mean(dim=2) @ weight.T)
    assert "classifier.bias" not in model.state_dict()
    assert model.num_classes == 7
    assert weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_dropout_stands_before_the_classifier_and_only_in_training() -> None:
    model = Classifier("test_resnet", num_classes=7, drop_rate=0.5)
    features = torch.ones(3, model.num_features, 2, 2)
    assert not torch.equal(model.classify(features), model.classify(features))
    model.eval()
    assert torch.equal(model.classify(features), model.classify(features))


def test_zeroed_norms_leave_an_efficientnet_its_signal() -> None:
    torch.manual_seed(0)
    model = Classifier("efficientnet_lite0", num_classes=3, zero_init_last=True).train()
    images = torch.randn(8, 3, 64, 64)
    logits = model(images)
    assert logits.std(dim=0).min() > 1e-4  # images are told apart
    blocks = [block for block in model.backbone.modules() if getattr(block, "bn3", None) is not None]
    assert {bool(block.bn3.weight.any()) for block in blocks if block.has_skip} == {False}


def test_stochastic_depth_is_refused_where_a_network_has_none() -> None:
    with pytest.raises(Refused, match=r"legacy_seresnet18\.in1k has no stochastic depth"):
        Classifier("legacy_seresnet18.in1k", num_classes=3, drop_path_rate=0.1)


@pytest.mark.parametrize(
    ("network", "what", "advice"),
    [
        ("resnet51", f'timm {timm.__version__} has no network "resnet51"', "Did you mean resnet"),
        ("resnet50.tv_in1", 'timm has no weights tagged "resnet50.tv_in1"', "Did you mean resnet50.tv_in1k?"),
    ],
)
def test_an_unknown_network_is_refused_with_the_nearest_one(network: str, what: str, advice: str) -> None:
    with pytest.raises(Refused) as raised:
        check_network(network, "plan.toml, line 3")
    assert str(raised.value).startswith(f"plan.toml, line 3: {what}")
    assert advice in raised.value.advice
    with pytest.raises(Refused):
        Classifier(network, num_classes=3)


@pytest.mark.parametrize("network", ["resnet50", "legacy_seresnet101", *BACKBONES])
def test_known_networks_pass_with_and_without_a_tag(network: str) -> None:
    check_network(network, "")


@pytest.mark.parametrize(
    ("network", "channels", "pooled"),  # of the map, and in front of the classifier; 0: no map
    [
        ("test_vit", 64, 64),  # class token
        ("test_vit2", 64, 64),  # a mean of patches, then its norm
        ("test_vit4", 96, 96),
        ("test_convnext", 64, 64),  # norm behind the mean
        ("mobilenetv3_small_050", 288, 1024),  # a convolution behind the mean
        ("ghostnet_050", 480, 1280),
        ("deit_tiny_distilled_patch16_224", 192, 192),  # two tokens
        ("efficientvit_b0", 128, 1280),
        ("pit_ti_224", 0, 256),
    ],
)
def test_features_are_pooled_as_timm_does_for_its_pretrained_weights(network: str, channels: int, pooled: int) -> None:
    torch.manual_seed(0)
    model = Classifier(network, num_classes=5).eval()
    theirs = timm.create_model(network, num_classes=0).eval()
    theirs.load_state_dict(model.backbone.state_dict())
    side = theirs.pretrained_cfg["input_size"][-1]
    images = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        features = model.features(images)
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        assert torch.equal(model.pool(features), expected)
        assert model.classify(features).shape == (2, 5)
        if channels:
            assert model.maps(features).shape == (2, channels, model.side, model.side)
    assert (model.num_features, model.classifier.in_features) == (channels, pooled)


@pytest.mark.parametrize("network", ["test_vit", "test_vit3", "test_convnext", "swin_s3_tiny_224", "hiera_tiny_224"])
def test_a_cell_of_the_map_lies_where_its_pixels_do(network: str) -> None:
    torch.manual_seed(0)
    model = Classifier(network, num_classes=2, crop=64).eval()
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    maps = model.maps(model.features(images))
    for row, column in ((0, model.side - 1), (model.side - 1, 0)):
        (gradient,) = torch.autograd.grad(maps[0, :, row, column].square().sum(), images, retain_graph=True)
        cells = nn.functional.avg_pool2d(gradient.square().sum(dim=1), 64 // model.side)[0]
        assert int(cells.argmax()) == row * model.side + column


@pytest.mark.parametrize(("network", "crop", "side"), [("test_vit", 96, 6), ("maxvit_rmlp_pico_rw_256", 224, 7)])
def test_a_network_is_built_for_the_size_of_its_images(network: str, crop: int, side: int) -> None:
    model = Classifier(network, num_classes=2, crop=crop).eval()
    with torch.inference_mode():
        features = model.features(torch.randn(1, 3, crop, crop))
        assert model.maps(features).shape[2:] == (side, side)
        assert model.classify(features).isfinite().all()


@pytest.mark.parametrize(
    ("network", "crop", "advice"),
    [("crossvit_tiny_240", 224, "240"), ("maxvit_rmlp_pico_rw_256", 112, "96, 128"), ("levit_128s", 64, "224")],
)
def test_a_size_that_a_network_does_not_take_is_refused_with_some_that_it_takes(
    network: str, crop: int, advice: str
) -> None:
    with pytest.raises(Refused, match=f"^mine: {network} takes no images of {crop} x {crop} pixels") as raised:
        check_network(network, "mine", crop)
    assert advice in raised.value.advice
    with pytest.raises(Refused):
        Classifier(network, num_classes=3, crop=crop)


def test_dropout_that_timm_builds_in_is_left_to_the_plan_but_for_the_one_of_the_seeds_network() -> None:
    torch.manual_seed(0)
    ghost, legacy = (Classifier(network, 3, crop=64).train() for network in ("ghostnet_050", "legacy_seresnet18"))
    assert (ghost.map_drop_rate, legacy.map_drop_rate) == (0.0, 0.2)
    features = torch.randn(2, legacy.num_features, 2, 2)
    assert torch.equal(legacy.pool(features), features.mean(dim=(2, 3)))


def test_looking_at_a_network_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    check_network("mobilenetv3_small_075", "")
    assert torch.equal(torch.rand(3), expected)


def test_mean_std_and_interpolation_are_the_weights_own() -> None:
    assert normalisation("legacy_seresnet101.in1k") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
    assert normalisation("tf_efficientnet_b3.ap_in1k")[0] == (0.5, 0.5, 0.5)
    assert normalisation("resnet50.tv_in1k")[2] == "bilinear"


# Branches (BBN) and rows of unit length (A-softmax)


@pytest.mark.parametrize("network", BACKBONES)
def test_every_backbone_of_the_seed_can_be_branched_before_its_pooling(network: str) -> None:
    with torch.device("meta"):
        plain, double = (Classifier(network, 10, Needs(branches=count)) for count in (1, 2))
        images = torch.zeros(2, 3, 96, 64)
        channels = BACKBONES[network][0]
        assert double.features(images).shape == (2, 2 * channels, 3, 2)
        assert double.branch(double.trunk(images), 1).shape == (2, channels, 3, 2)
        assert double.classifier.weight.shape == (10, 2 * channels)
    sizes = [sum(p.numel() for p in model.backbone_parameters()) for model in (plain, double)]
    last = sum(p.numel() for p in double.branches[0].parameters())
    assert sizes[1] == sizes[0] + last
    assert last > 0.1 * sizes[0]  # the last of four blocks at least, not a norm layer alone


def test_branches_begin_alike_and_learn_apart() -> None:
    torch.manual_seed(0)
    model = Classifier("test_resnet", num_classes=4, needs=Needs(branches=2))
    first, second = (list(branch.parameters()) for branch in model.branches)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    model.branch(model.trunk(torch.randn(2, 3, 32, 32)), 0).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in first)
    assert all(p.grad is None for p in second)
    assert {id(p) for p in (*first, *second)} < {id(p) for p in model.backbone_parameters()}


@pytest.mark.parametrize("network", ["test_vit", "test_vit2"])
def test_a_transformer_is_branched_behind_its_last_block_but_one(network: str) -> None:
    torch.manual_seed(0)
    plain, double = (Classifier(network, 10, Needs(branches=count), crop=64).eval() for count in (1, 2))
    double.load_state_dict(branched(plain.state_dict(), double), strict=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        one = plain.pool(plain.features(images))
        torch.testing.assert_close(double.pool(double.branch(double.trunk(images), 1)), one)
        torch.testing.assert_close(double.pool(double.features(images)), torch.cat([one, one], dim=1))
        torch.testing.assert_close(double(images), plain(images))


@pytest.mark.parametrize("network", ["mobilenetv3_small_050", "convnext_atto"])
def test_a_family_whose_last_block_is_not_known_is_refused_with_those_that_are(network: str) -> None:
    with pytest.raises(Refused, match=rf"{network} \(\w+\) has no last block that can be branched") as raised:
        Classifier(network, num_classes=3, needs=Needs(branches=2))
    assert "ResNet, SENet, EfficientNet, VisionTransformer" in raised.value.advice


def test_rows_of_unit_length_make_logits_of_directions_alone() -> None:
    torch.manual_seed(0)
    model = Classifier("test_resnet", num_classes=7, needs=Needs(unit_weights=True)).eval()
    features = torch.randn(3, model.num_features, 2, 2)
    weight = model.classifier.weight.detach()
    unit = weight / weight.square().sum(dim=1, keepdim=True).sqrt()
    expected = features.mean(dim=(2, 3)) @ unit.T
    torch.testing.assert_close(model.classify(features), expected)
    with torch.no_grad():
        model.classifier.weight *= torch.linspace(0.1, 9, 7)[:, None]
    torch.testing.assert_close(model.classify(features), expected)


@pytest.mark.parametrize("unit_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_logits_are_the_float32_product_of_the_features(
    dtype: torch.dtype, unit_weights: bool
) -> None:
    torch.manual_seed(0)
    model = Classifier("test_resnet", num_classes=7, needs=Needs(unit_weights=unit_weights)).eval()
    with torch.no_grad():
        model.classifier.weight *= 1000
    with torch.autocast("cpu", dtype):
        features = model.features(torch.randn(3, 3, 32, 32))
        logits = model.classify(features)
    assert features.dtype == dtype
    assert logits.dtype == torch.float32
    assert torch.equal(logits, model.classify(features))  # no rounding of its own
