"""shares: the bytes of a job are those of its shares, whatever the number of ranks that work on them, and when."""

import json
import pkgutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from job_process import ended, seen_by, start, train
from safetensors.torch import load_file
from test_job import NETWORK, result, told, work_in
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from aliprod import objectives
from aliprod.catalogue.catalogue import Catalogue
from aliprod.data.training_set import write_soft_labels
from aliprod.errors import Refused
from aliprod.models import weights
from aliprod.recipe import Inputs, Machine, Stage, TrainingJob
from aliprod.store.layout import newest_step
from aliprod.store.resumable import ResumableRows
from aliprod.training import checkpoint
from aliprod.training.shares import ShareMean, _all_gather, _Bucket

WITHOUT_BATCH_NORM = "test_efficientnet_gn"
SHARES = 4
OPTIONS: dict[str, dict[str, Any]] = {"dcl": {"parts": 2}, "lio": {"positives": 1}}
KINDS = [module.name for module in pkgutil.iter_modules(objectives.__path__)]
KINDS += ["classifier", "bfloat16", "float16", "sam", "device"]
ALIKE = ("arcface", "bi_tempered", "class_balanced", "focal", "hierarchy", "logit_adjustment")  # functions of logits


def stage_of(kind: str) -> Stage:
    """Two epochs of 4 steps, 8 images in four shares; all that draws random numbers or keeps sums is on."""
    side = 64 if kind in ("dcl", "lio", "device") else 32  # CPUs take their time
    said: dict[str, Any] = {"resize": side, "crop": side, "batch_size": 8, "epochs": 2, "shares": SHARES, "ema": 0.9}
    said |= {"drop_rate": 0.2, "drop_path_rate": 0.1, "lr": {"backbone": 0.02, "heads": 0.1}, "precision": "float32"}
    if kind == "classifier":
        said |= {"trains": "classifier", "start": "full"}
    elif kind == "sam":
        said |= {"optimizer": {"sharpness": 0.05}}
    elif kind == "device":
        said |= {"augment": "device", "augmentation": ["random_resized_crop", "flip", "auto_augment", "cutout"]}
        said |= {"crops": (32, 64)}
    elif kind in ("bfloat16", "float16"):
        said |= {"precision": kind}
    else:
        said |= {"objective": {"name": kind} | OPTIONS.get(kind, {})}
    return Stage.model_validate(said)


def in_processes(works: list[TrainingJob], catalogue: Path, ranks: int, end: int = 0) -> None:
    for work in works:
        work.folder.with_suffix(".meeting").unlink(missing_ok=True)
    processes = [start(works, catalogue, rank=rank, world_size=ranks, end=end) for rank in range(ranks)]
    assert [ended(process, 120 + 20 * len(works)) for process in processes] == [0] * ranks


@pytest.fixture(scope="module")
def inputs(packages: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Inputs]:
    """Weights to start from, and a teacher's labels, for the kinds that need them."""
    folder = tmp_path_factory.mktemp("inputs")
    start = work_in(folder, Stage(resize=32, crop=32, batch_size=16, precision="float32"))
    assert train(start, packages.root) == 0
    sure = torch.from_numpy(np.eye(4, dtype=np.float32)[packages.train.labels] * 0.6 + 0.1)
    write_soft_labels(
        ResumableRows(folder / "soft", packages.train.ids, packages.classes, {}, 256), lambda rows: [sure[rows]]
    )
    return {
        "classifier": Inputs(start=start.folder / "weights"),
        "distillation": Inputs(teachers=(folder / "soft",)),
    }


def works_in(folder: Path, inputs: dict[str, Inputs], kinds: list[str]) -> list[TrainingJob]:
    works = [(kind, work_in(folder / kind, stage_of(kind))) for kind in kinds]
    return [replace(work, inputs=inputs.get(kind, Inputs()), machine=Machine()) for kind, work in works]


@pytest.fixture(scope="module")
def by_ranks(
    packages: Catalogue, inputs: dict[str, Inputs], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, TrainingJob]]:
    """Every kind of stage, trained by one rank and by four."""
    done = {}
    for ranks in (1, 4):
        works = works_in(tmp_path_factory.mktemp(f"ranks{ranks}"), inputs, KINDS)
        in_processes(works, packages.root, ranks)
        done[ranks] = dict(zip(KINDS, works, strict=True))
    return done


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_and_four_end_with_the_same_bytes(by_ranks: dict[int, dict[str, TrainingJob]], kind: str) -> None:
    one, four = (by_ranks[ranks][kind] for ranks in (1, 4))
    assert result(one) == result(four)
    assert told(one) == told(four)
    assert weights.describe(one.folder / "weights") == weights.describe(four.folder / "weights")
    seen = [seen_by(four, rank) for rank in range(4)]
    assert seen == [seen[0]] * 4
    assert len({line["weights"] for line in seen[0]}) == 2  # it learns at each epoch


def test_a_job_that_changes_its_ranks_three_times_ends_with_the_bytes_of_one_that_does_not(
    packages: Catalogue, inputs: dict[str, Inputs], by_ranks: dict[int, dict[str, TrainingJob]], tmp_path: Path
) -> None:
    kinds = [kind for kind in KINDS if kind not in ALIKE]  # as cross entropy is: there is nothing else to lose
    works = works_in(tmp_path, inputs, kinds)
    for ranks, end, step in ((2, 1, 2), (1, 1, 3), (4, 1, 4)):  # the last of them in a scoring
        in_processes(works, packages.root, ranks, end)
        for work in works:
            assert newest_step(work.folder) == step, work.stage.objective.name
            assert not (work.folder / "weights").exists()
    in_processes(works, packages.root, 2)
    for kind, work in zip(kinds, works, strict=True):
        assert result(work) == result(by_ranks[1][kind]), kind
        assert told(work) == told(by_ranks[1][kind]), kind


def test_the_checkpoint_of_a_step_is_the_same_file_on_any_number_of_ranks(packages: Catalogue, tmp_path: Path) -> None:
    found = []
    for ranks, end in ((1, 2), (4, 1)):
        work = work_in(tmp_path / str(ranks), stage_of("dcl"))
        in_processes([work], packages.root, ranks, end)
        folder = checkpoint.newest(work.folder / "resume")
        assert folder is not None
        found.append({path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"})
    assert {"learner.safetensors", "optimizer.safetensors", "average.safetensors", "state.json"} <= set(found[0])
    assert found[0] == found[1]


def test_a_job_that_is_stopped_while_it_is_scored_loses_no_step(packages: Catalogue, tmp_path: Path) -> None:
    work = work_in(tmp_path / "stopped", stage_of("dcl"))
    whole = replace(work, folder=tmp_path / "whole" / "job")
    assert train(whole, packages.root) == 0
    in_processes([work], packages.root, 2, end=4)
    folder = checkpoint.newest(work.folder / "resume")
    assert folder is not None
    state = json.loads((folder / "state.json").read_text())
    assert (state["epoch"], state["step"], state["step_in_epoch"]) == (0, 4, 4)
    in_processes([work], packages.root, 1)
    assert result(work) == result(whole)
    assert told(work) == told(whole)


# The tree itself


class Toy(nn.Module):
    """A weight, and statistics of what it has seen."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.register_buffer("seen", torch.zeros(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


@settings(deadline=None)
@given(power=st.integers(0, 5), size=st.integers(1, 5), seed=st.integers(0, 1000))
def test_gradients_statistics_and_losses_are_added_pair_by_pair(power: int, size: int, seed: int) -> None:
    leaves = torch.randn(2**power, size, generator=torch.Generator().manual_seed(seed))
    toy = Toy(size)
    mean = ShareMean(toy, toy.parameters(), len(leaves))

    def backward(leaf: Tensor) -> dict[str, Tensor]:
        toy.weight.backward(leaf / len(leaves))
        toy.seen += leaf  # type: ignore[operator]
        toy.count += 1  # type: ignore[operator]
        return {"loss": leaf.sum()}

    losses, each = mean.of(leaves, backward)
    sums, totals = leaves, leaves.sum(dim=1)
    while len(sums) > 1:
        sums, totals = sums[0::2] + sums[1::2], totals[0::2] + totals[1::2]
    assert toy.weight.grad is not None
    assert torch.equal(toy.weight.grad, sums[0] / len(leaves))
    assert torch.equal(toy.seen, sums[0] / len(leaves))  # type: ignore[arg-type]
    assert torch.equal(losses["loss"], totals[0] / len(leaves))
    assert [float(one["loss"]) for one in each] == [float(leaf.sum()) for leaf in leaves]
    assert int(toy.count) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 2], ids=["added", "moved"])
def test_a_gradient_that_is_added_or_moved_to_its_node_keeps_every_bit(world_size: int) -> None:
    """Of one rank they are added, of several moved: -0.0 is where the two could differ."""
    odd = torch.tensor([-0.0, 0.0, 1.5, -(2.0**-149), torch.inf])
    parameter, unused = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3))
    bucket = _Bucket([parameter, unused], depth=1, world_size=world_size)
    bucket.sums[0].fill_(7.0)  # of the step before
    bucket.open(0)
    (parameter * odd).sum().backward()
    bucket.take(0, 0)
    bucket.close(0)
    assert parameter.grad is not None
    assert parameter.grad.view(torch.int32).equal(odd.view(torch.int32))
    assert unused.grad is not None
    assert unused.grad.view(torch.int32).equal(torch.full((3,), -0.0).view(torch.int32))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_send_as_much_as_a_ring_does_and_a_bucket_as_soon_as_it_is_ready(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, happened, sent = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))), list[str](), list[float]()
    for name, layer in enumerate(module):
        layer.weight.register_post_accumulate_grad_hook(lambda _, name=name: happened.append(f"gradient {name}"))
    scatter = dist.all_to_all_single

    def counted_scatter(into: Tensor, of: Tensor, **options: Any) -> Any:
        happened.append("sent")
        sent.append(len(of) * (ranks - 1) / ranks)
        return scatter(into, of, **options)

    def counted_gather(into: Tensor, of: Tensor, **options: Any) -> Any:
        sent.append(len(of) * (ranks - 1))
        return _all_gather(into, of, **options)

    monkeypatch.setattr(dist, "all_to_all_single", counted_scatter)
    monkeypatch.setattr("aliprod.training.shares._all_gather", counted_gather)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())  # it sends nothing
    try:
        mean = ShareMean(module, module.parameters(), shares=2 * ranks, world_size=ranks)

        def backward(images: Tensor) -> dict[str, Tensor]:
            loss = module(images).sum()
            loss.backward()
            return {"loss": loss.detach()}

        mean.of(torch.ones(2, 1, 1024), backward)
    finally:
        dist.destroy_process_group()
    assert happened[:4] == [f"gradient {name}" for name in (3, 2, 1, 0)], "one share is over"
    assert happened[4:] == ["gradient 3", "sent", "gradient 2", "gradient 1", "sent", "gradient 0", "sent"]
    gradient = sum(parameter.numel() for parameter in module.parameters())
    assert sum(sent) == pytest.approx(2 * (ranks - 1) / ranks * gradient, rel=1e-4)


# Near a step at once, and DDP's average


@pytest.fixture(scope="module")
def at_once(packages: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return trained(packages, tmp_path_factory.mktemp("whole"), 1)


def trained(packages: Catalogue, folder: Path, ranks: int, **said: Any) -> dict[str, Tensor]:
    stage = Stage(resize=40, crop=32, batch_size=16, precision="float32", **said)
    work = work_in(folder, stage, WITHOUT_BATCH_NORM)
    in_processes([work], packages.root, ranks)
    return load_file(work.folder / "weights" / "model.safetensors")


@pytest.mark.parametrize(("ranks", "shares"), [(1, 4), (2, 2), (2, "ranks")])
def test_a_step_in_shares_is_the_step_at_once_up_to_rounding(
    packages: Catalogue, at_once: dict[str, Tensor], tmp_path: Path, ranks: int, shares: Any
) -> None:
    found = trained(packages, tmp_path, ranks, shares=shares)
    for name, tensor in at_once.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_gradients_that_are_sent_in_bfloat16_are_near(
    packages: Catalogue, at_once: dict[str, Tensor], tmp_path: Path
) -> None:
    found = trained(packages, tmp_path, 2, shares="ranks", gradients="bfloat16")
    assert 0 < max((found[name] - tensor).abs().max().item() for name, tensor in at_once.items()) < 0.01


def test_more_ranks_than_shares_are_refused(packages: Catalogue, tmp_path: Path) -> None:
    work = work_in(tmp_path, stage_of("cross_entropy").model_copy(update={"shares": 1}), NETWORK)
    processes = [start(work, packages.root, rank=rank, world_size=2) for rank in (0, 1)]
    assert [ended(process) for process in processes] == [Refused.status] * 2
