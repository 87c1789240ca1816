"""What is exported answers as aliprod does, without aliprod, and says how; what cannot be is refused."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torchvision.transforms.functional import five_crop, hflip, pil_to_tensor

from aliprod.data.augment import eval_view
from aliprod.errors import Failed, Refused
from aliprod.export.folder import export
from aliprod.models import weights
from aliprod.models.classifier import Classifier
from aliprod.recipe import Needs
from aliprod.store import commit
from aliprod.store.lineage import Voice

MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.25, 0.2)
CLASSES = weights.Classes((3, 17, 42, 50029, 50030), ("banana", "キウイ", "", "two\nlines", "fig"))
LABELS = ["banana", "キウイ", "42", "two lines", "fig"]
CONFIG = weights.Config("", MEAN, STD, "bicubic", 40, 32, "net/soup", "0123", 2, 0.25, "soup")


def saved(folder: Path, network: str, seed: int = 0, branches: int = 1, **told: object) -> Path:
    """A weights folder of a network that is sure of what it sees."""
    config = replace(CONFIG, network=network, branches=branches, **told)
    torch.manual_seed(seed)
    needs = Needs(branches=branches, unit_weights=config.unit_weights)
    model = Classifier(network, len(CLASSES.ids), needs, crop=config.crop)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(*((0.5, 1.5) if name.endswith("var") else (-0.5, 0.5)))
    with torch.no_grad():
        model.classifier.weight.mul_(200)
    record = {"stage": {"objective": {"name": "cross_entropy"}}}
    commit.write(folder, lambda new: weights.save(new, model.state_dict(), config, CLASSES), record)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread(torch_as_before: None) -> None:
    """As several wait for each other on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def few_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the ensemble, which is made once."""
    monkeypatch.setattr("aliprod.export.folder.COMPARED", 12)


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(5)
    return [Image.fromarray(generator.integers(0, 256, (9 + n, 90 - n, 3), dtype=np.uint8)) for n in range(count)]


@torch.inference_mode()
def logits(folder: Path, views: Sequence[Tensor]) -> Tensor:
    """Of pixels (3, crop, crop) each, written out with torchvision's words."""
    model, config, _ = weights.load(folder)
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    return model(torch.stack([(pixels / 255 - mean) / std for pixels in views]))


def expected(folder: Path, given: Sequence[Image.Image], ten: bool = False) -> Tensor:
    _, config, _ = weights.load(folder)
    rows = []
    for picture in given:
        square = picture.resize((config.resize, config.resize), Image.Resampling[config.interpolation.upper()])
        views = [eval_view(pil_to_tensor(picture), config.resize, config.crop, config.interpolation)]
        if ten:
            views = [pil_to_tensor(cut) for side in (square, hflip(square)) for cut in five_crop(side, [config.crop])]
        rows.append(logits(folder, views).softmax(dim=1).mean(dim=0))
    return torch.stack(rows)


def told_apart(probabilities: Tensor) -> bool:
    """Whether a network says different things of different pictures, so that an error would show."""
    return float(probabilities.std(dim=0).max()) > 1e-3


def fed(session: onnxruntime.InferenceSession, given: Sequence[Image.Image]) -> Tensor:
    images = {}
    for one in session.get_inputs():
        interpolation, side = one.name.split("_")
        size, kind = (int(side), int(side)), Image.Resampling[interpolation.upper()]
        images[one.name] = np.stack([np.asarray(picture.resize(size, kind)) for picture in given])
    return torch.from_numpy(session.run(None, images)[0])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Voice]:
    """An ensemble of two that want pictures of two sizes."""
    folder = tmp_path_factory.mktemp("two")
    first = saved(folder / "resnet", "test_resnet", 1, job="net/dcl")
    other = saved(folder / "vit", "test_vit", 2, job="vit/full", crop=64, resize=72, interpolation="bilinear")
    return [Voice(first, 3, 1.5), Voice(other, 1, 0.8)]


@pytest.fixture(scope="module")
def ensemble(two: list[Voice]) -> Path:
    folder = two[0].folder.parent / "ensemble"
    best = {
        "split": "val",
        "views": "ten_crop",
        "images": 80,
        "ensemble": {"top1_error": 0.05, "interval": [0.01, 0.1]},
    }
    told = export(two, folder, "onnx", "ten_crop", worth=best)
    assert (told["images"], told["compared"]) == (100, "random pictures")
    assert told["largest_difference"] <= 1e-4
    return folder


def of_two(two: list[Voice], given: Sequence[Image.Image]) -> Tensor:
    total = torch.zeros(())
    for voice in two:
        powers = expected(voice.folder, given, ten=True) ** (1 / voice.temperature)
        total = total + voice.weight * powers / powers.sum(dim=1, keepdim=True)
    return total / sum(voice.weight for voice in two)


@pytest.mark.parametrize("network", ["test_resnet", "test_efficientnet", "test_vit"])
def test_one_member_answers_alike_in_batches_of_any_size(network: str, tmp_path: Path) -> None:
    size = {"crop": 64, "resize": 72} if network == "test_vit" else {}
    folder = saved(tmp_path / "weights", network, **size)
    export([Voice(folder)], tmp_path / "out", "onnx", "center")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for count in (1, 3, 10):
        found = fed(session, pictures(count))
        torch.testing.assert_close(found, expected(folder, pictures(count)), rtol=0, atol=1e-5)
    assert told_apart(found)
    assert (tmp_path / "out" / "classes.txt").read_text(encoding="utf-8").splitlines() == LABELS


def test_an_ensemble_is_the_weighted_mean_of_its_tempered_members(ensemble: Path, two: list[Voice]) -> None:
    found = fed(onnxruntime.InferenceSession(ensemble / "model.onnx"), pictures(4))
    torch.testing.assert_close(found, of_two(two, pictures(4)), rtol=0, atol=1e-5)
    assert told_apart(found)


def test_the_graph_names_its_inputs_batch_and_classes_and_nothing_of_this_machine(ensemble: Path) -> None:
    model = onnx.load(ensemble / "model.onnx")
    shapes = {one.name: [axis.dim_param or axis.dim_value for axis in one.type.tensor_type.shape.dim]
              for one in (*model.graph.input, *model.graph.output)}  # fmt: skip
    assert shapes == {
        "bicubic_40": ["batch", 40, 40, 3], "bilinear_72": ["batch", 72, 72, 3], "probabilities": ["batch", 5]
    }  # fmt: skip
    [classes] = [one.value for one in model.metadata_props if one.key == "classes"]
    assert classes.splitlines() == LABELS
    content = (ensemble / "model.onnx").read_bytes()
    assert all(word not in content for word in (b".py", b"aliprod", str(Path.cwd()).encode()))


def test_the_card_says_what_it_is_and_how_good(ensemble: Path, two: list[Voice]) -> None:
    text = (ensemble / "README.md").read_text(encoding="utf-8")
    assert re.match(
        r"---\nlibrary_name: onnx\npipeline_tag: image-classification\ntags: \[.*\]\nmetrics: .*\n---\n", text
    )
    assert "5.00% (1.00% to 10.00%) on val, ten crops, 80 images" in text
    for voice, job in zip(two, ("net/dcl", "vit/full"), strict=True):
        [row] = [line for line in text.splitlines() if line.startswith(f"| {job} |")]
        sha256 = commit.digests(voice.folder)[weights.MODEL][:16]
        assert row.endswith(f"| {voice.weight} | {voice.temperature} | {weights.load(voice.folder)[1].crop} "
                            f"| cross_entropy | 3 | 25.00% | 0123 | {sha256} |")  # fmt: skip
    assert commit.verify(ensemble) == []


@pytest.mark.parametrize(
    ("form", "without"), [("onnx", "aliprod torch timm"), ("torch", "aliprod timm onnxruntime"), ("timm", "aliprod")]
)
def test_the_lines_of_the_card_run_without_aliprod(
    form: str, without: str, ensemble: Path, two: list[Voice], tmp_path: Path
) -> None:
    folder = ensemble
    if form != "onnx":
        folder, views = tmp_path / form, "center" if form == "timm" else "ten_crop"
        export(two[:1] if form == "timm" else two, folder, form, views)  # type: ignore[arg-type]
    text = (folder / "README.md").read_text(encoding="utf-8")
    [lines] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    [picture] = pictures(1)
    picture.save(folder / "picture.jpg", quality=95)
    program = (
        f"import sys\nsys.modules.update(dict.fromkeys('{without}'.split()))\n{lines}\n"
        "print(*map(float, probabilities[0]))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=folder, capture_output=True, text=True)  # noqa: PLW1510
    assert done.returncode == 0, done.stderr
    found = torch.tensor([[float(word) for word in done.stdout.split()]])
    again = [Image.open(folder / "picture.jpg").convert("RGB")]
    right = of_two(two, again)
    if form == "timm":
        powers = expected(two[0].folder, again) ** (1 / two[0].temperature)
        right = powers / powers.sum()
    torch.testing.assert_close(found, right, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("network", "told"),
    [
        ("test_resnet.r160_in1k", {"resize": 37}),
        ("test_efficientnet", {"interpolation": "bilinear", "crop": 49, "resize": 79}),
        ("test_vit", {"crop": 64, "resize": 64}),
        ("test_resnet", {"unit_weights": True}),
    ],
)
def test_timm_loads_it_sees_the_same_pixels_and_makes_the_same_logits(
    network: str, told: dict[str, object], tmp_path: Path
) -> None:
    folder = saved(tmp_path / "weights", network, **told)
    export([Voice(folder)], tmp_path / "out", "timm", "center")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert model.state_dict().keys() == timm.create_model(network.split(".")[0], num_classes=5).state_dict().keys()
    _, config, _ = weights.load(folder)
    view = create_transform(**resolve_model_data_config(model))
    views = [eval_view(pil_to_tensor(one), config.resize, config.crop, config.interpolation) for one in pictures(3)]
    seen = torch.stack([view(picture) for picture in pictures(3)])
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    torch.testing.assert_close(seen, (torch.stack(views) / 255 - mean) / std)
    with torch.inference_mode():
        torch.testing.assert_close(model(seen), logits(folder, views))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["num_classes"], written["label_names"]) == (5, LABELS)


@pytest.mark.parametrize("form", ["torch", "timm"])
def test_the_same_weights_make_the_same_bytes(form: str, two: list[Voice], tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(two[:1], tmp_path / name, form, "center")  # type: ignore[arg-type]
    one, other = (commit.digests(tmp_path / name) for name in ("one", "two"))
    assert one == other


def test_an_ensemble_makes_the_same_graph_again(ensemble: Path, two: list[Voice], tmp_path: Path) -> None:
    export(two, tmp_path / "again", "onnx", "ten_crop")
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (ensemble / "model.onnx").read_bytes()


def test_what_answers_otherwise_is_not_there(tmp_path: Path) -> None:
    folder = saved(tmp_path / "weights", "test_resnet")
    (folder / commit.MANIFEST).unlink()
    tensors = load_file(folder / weights.MODEL)
    save_file(tensors | {"classifier.weight": tensors["classifier.weight"] * torch.nan}, folder / weights.MODEL)
    with pytest.raises(Failed, match="differ from aliprod's by up to nan"):
        export([Voice(folder)], tmp_path / "out", "timm", "center")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("form", ["onnx", "torch", "timm"])
def test_what_a_format_does_not_take_is_told_in_a_sentence(form: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "weights", "test_vit", crop=64, resize=40)  # no crop fits
    with pytest.raises(Failed, match=f"{form} does not take this model: \\S"):
        export([Voice(folder)], tmp_path / "out", form, "center")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("network", ["levit_128s", "deit_tiny_distilled_patch16_224"])
def test_timm_is_refused_a_classifier_that_it_builds_otherwise(network: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "weights", network, crop=224, resize=224)
    with pytest.raises(Refused, match="has another classifier than one linear layer"):
        export([Voice(folder)], tmp_path / "out", "timm", "center")
    assert not (tmp_path / "out").exists()


def test_what_timm_cannot_hold_is_refused(two: list[Voice], tmp_path: Path) -> None:
    branched = [Voice(saved(tmp_path / "weights", "test_resnet", branches=2))]
    for voices, views, what in ((two, "center", "has 2 members"), (two[:1], "ten_crop", "the centre alone"),
                                (branched, "center", "no networks with branches")):  # fmt: skip
        with pytest.raises(Refused, match=what):
            export(voices, tmp_path / "out", "timm", views)  # type: ignore[arg-type]


def test_a_folder_that_is_there_stays_as_it_is(two: list[Voice], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(Refused, match="is there already"):
        export(two, tmp_path, "onnx", "center")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_the_extra_it_is_said_what_to_install(
    two: list[Voice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(Refused, match="takes onnxscript, which is not installed") as raised:
        export(two, tmp_path / "out", "onnx", "center")
    assert "pip install 'aliprod[export]'" in raised.value.advice


def test_a_bank_of_neighbours_is_refused_by_every_format(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier("test_resnet", len(CLASSES.ids), crop=32, bank=9)
    model.classifier.fill(iter(torch.randn(9, model.classifier.in_features).split(4)), torch.arange(9) % 5, 3, 0.07)
    config = replace(CONFIG, network="test_resnet")
    commit.write(tmp_path / "bank", lambda new: weights.save(new, model.state_dict(), config, CLASSES))
    for form in ("onnx", "torch", "timm"):
        with pytest.raises(Refused, match="looks its answers up among training images"):
            export([Voice(tmp_path / "bank")], tmp_path / form, form, "center")
