"""predict: a member's probabilities are those of its views, each picture once."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as F

from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.decode import decode
from aliprod.data.augment import square
from aliprod.data.loader import Feed
from aliprod.inference.predict import Views, predict
from aliprod.inference.probabilities import write
from aliprod.models.classifier import Classifier
from aliprod.store import commit

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FEED = Feed(torch.device("cpu"), MEAN, STD, "bicubic")


@pytest.fixture(scope="module")
def model() -> Classifier:
    torch.manual_seed(0)
    model = Classifier("test_resnet", num_classes=4)
    torch.nn.init.normal_(model.classifier.weight, std=1.0)  # so that classes differ
    model.train()(torch.randn(16, 3, 32, 32))
    return model.eval()


def probabilities(
    model: Classifier, packages: Catalogue, views: Views, feed: Feed = FEED, resize: int = 41
) -> dict[int, torch.Tensor]:
    batches = predict(model, packages.test, resize, 32, views, feed)
    return {int(row): table[i] for rows, table in batches for i, row in enumerate(rows)}


def forward(model: Classifier, view: torch.Tensor) -> torch.Tensor:
    """Softmax of one crop of 8 bits, on its own."""
    image = F.normalize(view.float() / 255, MEAN, STD)
    with torch.inference_mode():
        return model(image[None])[0].softmax(dim=0)


def test_ten_crops_are_ten_forward_passes_averaged_after_the_softmax(model: Classifier, packages: Catalogue) -> None:
    found = probabilities(model, packages, "ten_crop")
    assert sorted(found) == list(range(40))
    for row, probability in found.items():
        squared = square(decode(packages.test.path(row)), 41, "bicubic")
        expected = torch.stack([forward(model, view) for view in F.ten_crop(squared, [32, 32])]).mean(dim=0)
        torch.testing.assert_close(probability, expected, rtol=0, atol=1e-5)


def test_one_view_is_the_centre_crop(model: Classifier, packages: Catalogue) -> None:
    for resize in (41, 42, 32):
        for row, probability in probabilities(model, packages, "center", resize=resize).items():
            squared = square(decode(packages.test.path(row)), resize, "bicubic")
            torch.testing.assert_close(probability, forward(model, F.center_crop(squared, [32, 32])), rtol=0, atol=1e-5)


def test_ten_crops_differ_from_one_and_rows_are_distributions(model: Classifier, packages: Catalogue) -> None:
    ten, one = (torch.stack(list(probabilities(model, packages, views).values())) for views in ("ten_crop", "center"))
    assert (ten - one).abs().max() > 1e-3
    torch.testing.assert_close(ten.sum(dim=1), torch.ones(40))
    assert ten.dtype == torch.float32


def test_ranks_share_the_rows_and_change_no_probability(model: Classifier, packages: Catalogue) -> None:
    whole = probabilities(model, packages, "ten_crop")
    shares = [probabilities(model, packages, "ten_crop", replace(FEED, rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(row for share in shares for row in share) == list(range(40))
    for share in shares:
        for row, probability in share.items():
            torch.testing.assert_close(probability, whole[row], rtol=0, atol=1e-6)


def test_a_prediction_that_goes_on_after_its_first_shard_ends_with_the_same_bytes(
    model: Classifier, packages: Catalogue, tmp_path: Path
) -> None:
    asked: list[int] = []

    def seen(rows: np.ndarray) -> Iterator[torch.Tensor]:
        asked.append(len(rows))
        for _, block in predict(model, packages.test.take(rows), 41, 32, "ten_crop", FEED):
            yield block

    def interrupted(rows: np.ndarray) -> Iterator[torch.Tensor]:
        yield next(seen(rows))
        raise KeyboardInterrupt

    ids, classes = packages.test.ids, packages.classes
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "resumed", ids, classes, interrupted, rows_per_shard=32)
    write(tmp_path / "resumed", ids, classes, seen, rows_per_shard=32)
    write(tmp_path / "undisturbed", ids, classes, seen, rows_per_shard=32)
    assert asked == [40, 8, 40]
    assert commit.digest(tmp_path / "resumed") == commit.digest(tmp_path / "undisturbed")


@pytest.mark.parametrize("views", ["ten_crop", "center"])
def test_batches_divide_the_rows_of_a_shard(model: Classifier, packages: Catalogue, views: Views) -> None:
    many = packages.test.take(np.arange(300) % 40)
    sizes = [len(rows) for rows, _ in predict(model, many, 41, 32, views, FEED)]
    assert 256 % sizes[0] == 0
    assert set(sizes[:-1]) == {sizes[0]}
