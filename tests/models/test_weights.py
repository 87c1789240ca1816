"""weights: what is saved comes back to the bit; what does not fit is refused with a sentence."""

import json
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from aliprod.errors import Refused
from aliprod.models import weights
from aliprod.models.classifier import Classifier
from aliprod.models.weights import Classes, Config, fetch_pretrained, load_parent, load_pretrained
from aliprod.recipe import Needs
from aliprod.store import commit

NETWORK = "test_resnet.r160_in1k"
CLASSES = Classes((3, 17, 50029), ("banana", "キウイ", ""))
CONFIG = Config(NETWORK, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), "bilinear", 40, 32, "net/full", "0123", 2, 0.25, True)


def classifier(
    seed: int, network: str = NETWORK, num_classes: int = 3, branches: int = 1, unit_weights: bool = False
) -> Classifier:
    torch.manual_seed(seed)
    model = Classifier(network, num_classes, Needs(branches=branches, unit_weights=unit_weights))
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(*((0.5, 1.5) if name.endswith("var") else (-0.5, 0.5)))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fill = partial(weights.save, tensors=classifier(0).state_dict(), config=CONFIG, classes=CLASSES)
    commit.write(tmp_path / "weights", fill)
    return tmp_path / "weights"


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_weights_configuration_and_classes_come_back_to_the_bit(saved: Path) -> None:
    model, config, classes = weights.load(saved)
    assert same(model.state_dict(), classifier(0).state_dict())
    assert (config, classes) == (CONFIG, CLASSES)
    assert not model.training


def test_channels_last_weights_are_saved_in_the_usual_order(tmp_path: Path) -> None:
    model = classifier(0).to(memory_format=torch.channels_last)
    weights.save(tmp_path, model.state_dict(), CONFIG, CLASSES)
    assert same(load_file(tmp_path / "model.safetensors"), classifier(0).state_dict())


def test_a_child_takes_its_parents_backbone_and_head(saved: Path) -> None:
    child = classifier(1)
    load_parent(child, saved, (3, 17, 50029))
    assert same(child.state_dict(), classifier(0).state_dict())


def test_a_parent_of_as_many_other_classes_is_refused(saved: Path) -> None:
    child = classifier(1)
    with pytest.raises(Refused, match="was trained on another class list"):
        load_parent(child, saved, (3, 17, 42))
    assert same(child.state_dict(), classifier(1).state_dict())


@pytest.mark.parametrize(("network", "num_classes"), [("test_efficientnet.r160_in1k", 3), (NETWORK, 4)])
def test_weights_of_another_network_or_number_of_classes_are_refused(
    saved: Path, network: str, num_classes: int
) -> None:
    with pytest.raises(Refused, match=rf"model.safetensors: is not of {network}: \d+ of its \d+ tensors are missing"):
        load_parent(classifier(1, network, num_classes), saved, CLASSES.ids)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "classes.json", "manifest.json"])
def test_a_flipped_bit_in_any_file_is_refused(saved: Path, name: str) -> None:
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(Refused):
        weights.load(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x04."], ids=["empty", "torn", "pickle"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "classes.json"])
def test_a_strangers_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    weights.save(tmp_path, classifier(0).state_dict(), CONFIG, CLASSES)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused):
        weights.load(tmp_path)


def test_a_folder_without_weights_is_refused_and_told_what_one_holds(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="is no weights folder") as raised:
        weights.load(tmp_path / "nothing")
    assert "model.safetensors, config.json and classes.json" in raised.value.advice


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("trapped"),))


def test_no_pickle_is_ever_opened(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.safetensors").write_bytes(pickle.dumps(Trap()))
    torch.save(classifier(0).state_dict(), tmp_path / "net.pth")
    for file in ("net.safetensors", "net.pth"):
        with pytest.raises(Refused, match="holds no pretrained weights"):
            load_pretrained(classifier(0), tmp_path / file)
    assert not (tmp_path / "trapped").exists()


def pretrained(tmp_path: Path, network: str, without: str = "-") -> Path:
    torch.manual_seed(5)
    whole = timm.create_model(network.split(".")[0], num_classes=1000)
    tensors = {name: tensor for name, tensor in whole.state_dict().items() if not name.endswith(without)}
    save_file(tensors, tmp_path / f"{network}.safetensors")
    return tmp_path / f"{network}.safetensors"


@pytest.mark.parametrize("without", ["-", "num_batches_tracked"], ids=["whole", "without counters"])
def test_a_pretrained_file_fills_the_backbone_and_leaves_the_head(tmp_path: Path, without: str) -> None:
    file = pretrained(tmp_path, NETWORK, without)
    model = classifier(1)
    load_pretrained(model, tmp_path / f"{NETWORK}.safetensors")
    tensors = load_file(file)
    for name, tensor in model.backbone.state_dict().items():
        if name in tensors:
            assert torch.equal(tensor, tensors[name])
    assert torch.equal(model.classifier.weight, classifier(1).classifier.weight)


def test_a_pretrained_file_of_another_network_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    file = pretrained(tmp_path, "test_efficientnet.r160_in1k")
    model = classifier(1)
    with pytest.raises(Refused, match=rf"is not of {NETWORK}: \d+ of its \d+ tensors are missing or of another shape"):
        load_pretrained(model, file)
    assert same(model.state_dict(), classifier(1).state_dict())


def test_a_missing_pretrained_file_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="holds no pretrained weights for test_resnet") as raised:
        load_pretrained(classifier(1), tmp_path / "none.safetensors")
    assert 'Set pretrained = "PATH"' in raised.value.advice


def test_a_network_without_imagenet_weights_is_refused_before_any_download(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="has no pretrained weights for seresnet101") as raised:
        fetch_pretrained("seresnet101", tmp_path / "seresnet101")
    assert "seresnet101" in raised.value.advice
    assert not (tmp_path / "seresnet101").exists()


# Branches and rows of unit length


def saved_as(folder: Path, model: Classifier) -> Path:
    config = replace(CONFIG, network=model.network, branches=len(model.branches) or 1, unit_weights=model.unit_weights)
    commit.write(folder, partial(weights.save, tensors=model.state_dict(), config=config, classes=CLASSES))
    return folder


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("network", [NETWORK, "legacy_seresnet18", "test_efficientnet"])
@torch.inference_mode()
def test_two_branches_answer_as_the_plain_parent_that_they_come_from(tmp_path: Path, network: str) -> None:
    parent = classifier(0, network).eval()
    child = classifier(1, network, branches=2).eval()
    assert not torch.allclose(child(images()), parent(images()))
    load_parent(child, saved_as(tmp_path / "parent", parent), CLASSES.ids)
    trunk = child.trunk(images())
    assert all(torch.equal(child.branch(trunk, number), parent.features(images())) for number in (0, 1))
    torch.testing.assert_close(child(images()), parent(images()))


@pytest.mark.parametrize("unit_weights", [False, True])
@pytest.mark.parametrize("branches", [1, 2])
@torch.inference_mode()
def test_branches_and_unit_rows_come_back_from_disk(tmp_path: Path, branches: int, unit_weights: bool) -> None:
    model = classifier(0, branches=branches, unit_weights=unit_weights).eval()
    loaded, config, _ = weights.load(saved_as(tmp_path / "weights", model))
    assert (config.branches, config.unit_weights) == (branches, unit_weights)
    assert same(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded(images()), model(images()))
    child = classifier(1, branches=branches, unit_weights=unit_weights).eval()
    load_parent(child, tmp_path / "weights", CLASSES.ids)
    assert torch.equal(child(images()), model(images()))


@torch.inference_mode()
@pytest.mark.parametrize("branches", [1, 2])
def test_a_plain_child_answers_as_its_parent_of_unit_rows(tmp_path: Path, branches: int) -> None:
    parent = classifier(0, unit_weights=True).eval()
    child = classifier(1, branches=branches).eval()
    load_parent(child, saved_as(tmp_path / "parent", parent), CLASSES.ids)
    torch.testing.assert_close(child(images()), parent(images()))


def test_weights_of_two_branches_do_not_fit_a_plain_child(tmp_path: Path) -> None:
    parent = saved_as(tmp_path / "parent", classifier(0, branches=2))
    child = classifier(1)
    with pytest.raises(Refused, match=rf"is not of {NETWORK}: \d+ of its \d+ tensors are missing or of another shape"):
        load_parent(child, parent, CLASSES.ids)
    assert same(child.state_dict(), classifier(1).state_dict())


@pytest.mark.parametrize("without", ["-", "num_batches_tracked"], ids=["whole", "without counters"])
@torch.inference_mode()
def test_a_pretrained_file_fills_every_branch_and_leaves_the_head(tmp_path: Path, without: str) -> None:
    file = pretrained(tmp_path, NETWORK, without)
    plain, double = classifier(1).eval(), classifier(1, branches=2).eval()
    head = double.classifier.weight.clone()
    for model in (plain, double):
        load_pretrained(model, file)
    features = plain.features(images())
    assert torch.equal(double.features(images()), torch.cat([features, features], dim=1))
    assert torch.equal(double.classifier.weight, head)


def test_the_files_are_plain_json_and_safetensors(saved: Path) -> None:
    assert json.loads((saved / "classes.json").read_text(encoding="utf-8"))["names"][1] == "キウイ"
    assert {path.name for path in saved.iterdir()} == {
        "model.safetensors", "config.json", "classes.json", "manifest.json"
    }  # fmt: skip


# Networks that are built for one size


def test_position_embeddings_of_another_crop_are_interpolated_as_timm_does(tmp_path: Path) -> None:
    config = replace(CONFIG, network="test_vit", crop=64)
    parent, child = (Classifier("test_vit", 3, crop=crop) for crop in (64, 96))
    weights.save(tmp_path, parent.state_dict(), config, CLASSES)
    load_parent(child, tmp_path, CLASSES.ids)
    theirs, own = child.state_dict(), parent.state_dict()
    expected = resample_abs_pos_embed(own["backbone.pos_embed"], (6, 6), (4, 4), num_prefix_tokens=1)
    torch.testing.assert_close(theirs.pop("backbone.pos_embed"), expected)
    assert all(torch.equal(own[name], tensor) for name, tensor in theirs.items())
    assert weights.load(tmp_path)[0].side == 4


@pytest.mark.parametrize("network", ["swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "test_vit3"])
def test_pretrained_weights_of_the_networks_own_size_fit_another_crop(network: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(network)
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, tmp_path / "own.safetensors")
    model = Classifier(network, 3, crop=96).eval()
    load_pretrained(model, tmp_path / "own.safetensors")
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 96, 96)).isfinite().all()


@pytest.mark.parametrize("network", ["gmlp_ti16_224", "hiera_tiny_224"])  # which timm does not resize
def test_weights_that_are_made_for_one_size_alone_are_refused_at_another(network: str, tmp_path: Path) -> None:
    save_file(timm.create_model(network).state_dict(), tmp_path / "own.safetensors")
    with pytest.raises(Refused, match=f"is not of {network}") as raised:
        load_pretrained(Classifier(network, 3, crop=96), tmp_path / "own.safetensors")
    assert "of the same crop" in raised.value.advice
