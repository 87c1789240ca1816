"""forecast: a run's policy with measured rates, its arithmetic written out, and what holds for any plan."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aliprod.build.allot import Paths
from aliprod.build.graph import targets
from aliprod.build.target import Resources, Target
from aliprod.catalogue import sources
from aliprod.errors import Refused
from aliprod.forecast import rates
from aliprod.forecast.demand import demand
from aliprod.forecast.rates import Estimates, speed_up
from aliprod.forecast.simulate import STARTING_SECONDS as START
from aliprod.forecast.simulate import forecast, lower_bound, machines, simulate
from aliprod.plan.jobs import jobs_of
from aliprod.plan.load import load
from aliprod.plan.open import Opened
from aliprod.plan.places import resolve
from aliprod.store import commit

GPUS = 4
SEED = Path(__file__).resolve().parents[2] / "jobs" / "aliproducts.toml"
PLAN = """\
format = 1
name = "shop"
catalogue = { path = "photos" }
backbones = { net = "test_resnet.r160_in1k" }
defaults = { batch_size = 4, resize = 40, crop = 32 }
stages = { full = { epochs = 3 }, balanced = { start = "full", images = { per_class = 2 } }, accuracy = { start = "full", objective = "accuracy", epochs = 2 } }
jobs = { net = ["full", "balanced", "accuracy"] }
ensemble = { members = ["net/accuracy"] }
"""  # noqa: E501


@pytest.fixture
def prepared(tmp_path: Path, photos: Path) -> Opened:
    (tmp_path / "photos").symlink_to(photos)
    return prepare(tmp_path)


def prepare(folder: Path, *sets: str) -> Opened:
    (folder / "plan.toml").write_text(PLAN)
    plan = load(folder / "plan.toml", sets)
    catalogue = sources.read(folder / "photos")
    places = resolve(plan, folder / "runs", None, None)
    return Opened(plan, PLAN, places, catalogue, jobs_of(plan, catalogue.fingerprint))


def measured(prepared: Opened, speeds: Mapping[str, float], device: str = "NVIDIA H100") -> None:
    """As `aliprod benchmark train PLAN` would keep it."""
    for piece in rates.pieces(prepared, "train"):
        if piece.part in speeds:
            rates.keep(prepared, piece, {"images_per_second": speeds[piece.part], "device": device})


def told(prepared: Opened, name: str, *speeds: float, **facts: Any) -> None:
    """Lines of metrics.jsonl, as a training writes them."""
    folder = prepared.job_folder(name)
    folder.mkdir(parents=True)
    lines = [
        {"epoch": epoch, "time_ms": 1_700_000_000_000 + epoch, **facts, "train/loss": 1.0}
        | {"speed/images_per_second": speed, "speed/data_wait_share": 0.1, "speed/memory_bytes": 1e9}
        for epoch, speed in enumerate(speeds)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def finish(prepared: Opened, name: str, **record: Any) -> None:
    commit.write(
        prepared.job_folder(name) / "weights",
        lambda folder: commit.write_file(folder / "model.safetensors", b"weights"),
        record,
    )


def test_a_job_takes_its_images_at_the_measured_rates(prepared: Opened) -> None:
    measured(prepared, {"train": 10.0, "center": 40.0, "ten_crop": 4.0})
    found = forecast(prepared, 1)
    catalogue = prepared.catalogue
    full = 3 * (20 / 10 + len(catalogue.val) / 40)  # 5 steps of 4 images an epoch, then val
    balanced = 4 / 10 + len(catalogue.val) / 40  # 2 classes of 2
    accuracy = 2 * (20 / 10 + len(catalogue.val) / 40)
    ten_crop = len(catalogue.test) / 4
    assert [job.seconds for job in found.jobs] == pytest.approx([START + full, START + balanced, START + accuracy])
    assert found.prediction_seconds == pytest.approx(ten_crop)
    assert found.lower_bound_seconds == pytest.approx(full + balanced + accuracy + ten_crop)
    assert found.seconds == pytest.approx(3 * START + found.lower_bound_seconds)
    assert found.gpu_hours == pytest.approx(found.seconds / 3600)
    hours = demand(prepared).gpu_hours
    assert sum(hours.values()) == pytest.approx(found.gpu_hours), "as plan says without --gpus"
    assert hours["net/accuracy"] == pytest.approx((START + accuracy + ten_crop) / 3600), "its prediction among them"
    assert {job.source for job in found.jobs} == {"benchmark, NVIDIA H100"}
    assert {job.ranks for job in found.jobs} == {(1,)}
    both = forecast(prepared, 2)  # balanced beside accuracy
    assert both.lower_bound_seconds == pytest.approx(full + accuracy + ten_crop)
    assert both.seconds == pytest.approx(2 * START + both.lower_bound_seconds)
    assert both.gpu_hours == pytest.approx(found.gpu_hours)


def test_where_no_rate_is_known_the_longest_path_of_the_seeds_plan_comes_first(tmp_path: Path, photos: Path) -> None:
    plan = load(SEED)
    catalogue = sources.read(photos)
    opened = Opened(plan, "", resolve(plan, tmp_path, None, None), catalogue, jobs_of(plan, catalogue.fingerprint))
    graph = targets(opened, gpu=True)
    trainings = {name: one for name, one in graph.items() if one.kind == "training"}
    order = Paths.of(trainings, Estimates(opened).seconds).in_order(trainings)
    assert order.index("resnet50/full") == 0  # dcl at 448 comes behind it
    assert order.index("efficientnet-b3/full") < order.index("seresnet101/full")  # one stage more behind it
    assert all(order.index(parent) < order.index(name) for name, job in opened.jobs.items() for parent in job.parents)


def test_what_a_job_has_told_goes_before_its_twin_and_that_before_the_benchmark(prepared: Opened) -> None:
    measured(prepared, {"train": 1.0, "center": 40.0, "ten_crop": 4.0})
    told(prepared, "net/full", 5.0, 11.0, 10.0, device="NVIDIA H100", **{"speed/ranks": 1})
    full, balanced, accuracy = forecast(prepared, 1).jobs
    assert (full.images_per_second, full.source) == (10.0, "net/full, NVIDIA H100")
    assert (balanced.images_per_second, balanced.source) == (10.0, "net/full, NVIDIA H100"), "the same step"
    assert (accuracy.images_per_second, accuracy.source) == (1.0, "benchmark, NVIDIA H100"), "another objective"


def test_what_several_ranks_have_told_is_scaled_to_those_asked_for(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "photos").symlink_to(photos)
    prepared = prepare(tmp_path, "cluster.ranks=4", "defaults.shares=4")
    told(prepared, "net/full", 70.0, device="NVIDIA H100", **{"speed/ranks": 2})
    measured(prepared, {"train": 1.0, "ten_crop": 4.0})
    full = forecast(prepared, 4).jobs[0]
    assert full.images_per_second == pytest.approx(70.0 * speed_up(4) / speed_up(2))


def test_finished_jobs_and_predictions_cost_nothing(prepared: Opened) -> None:
    measured(prepared, {"train": 10.0, "center": 40.0, "ten_crop": 4.0})
    before = forecast(prepared, 1)
    finish(prepared, "net/full")
    without = forecast(prepared, 1)
    assert (without.jobs[0].seconds, without.jobs[0].begin, without.jobs[0].source) == (0.0, None, None)
    assert without.seconds == pytest.approx(before.seconds - before.jobs[0].seconds)
    for name in ("net/balanced", "net/accuracy"):
        finish(prepared, name)
    assert forecast(prepared, 1).seconds == pytest.approx(before.prediction_seconds)
    sha256 = hashlib.sha256(b"weights").hexdigest()
    store = prepared.job_folder("net/accuracy") / "probabilities" / f"{sha256[:16]}-test"
    commit.write(store, lambda folder: None, {})
    assert forecast(prepared, 1).seconds == 0.0


def test_a_job_on_its_way_costs_what_lies_behind_its_newest_checkpoint(prepared: Opened) -> None:
    measured(prepared, {"train": 10.0, "center": 40.0, "ten_crop": 4.0})
    for step in (5, 7):  # of 15; an epoch has 5
        (prepared.job_folder("net/full") / "resume" / f"step-{step:010d}").mkdir(parents=True)
    full = forecast(prepared, 1).jobs[0]
    assert full.seconds == pytest.approx(START + 8 * 4 / 10 + 2 * len(prepared.catalogue.val) / 40)


def test_without_a_rate_there_is_no_total_and_it_is_said_of_what(prepared: Opened) -> None:
    told(prepared, "net/full", 10.0)
    found = forecast(prepared, 1)
    assert (found.seconds, found.gpu_hours, found.lower_bound_seconds) == (None, None, None)
    assert found.missing == ["net/accuracy", "net/accuracy test"]
    full, _, accuracy = found.jobs
    assert (accuracy.seconds, accuracy.begin, accuracy.source) == (None, None, None)
    assert full.seconds == pytest.approx(3 * (20 / 10 + len(prepared.catalogue.val) / 30)), (
        "val at three times the rate"
    )


def test_what_is_made_for_a_job_is_counted_where_it_can_be_and_named_where_not(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "photos").symlink_to(photos)
    sets = ['stages.balanced.duplicates="drop"', 'stages.accuracy.objective="distillation"']
    prepared = prepare(tmp_path, *sets, 'stages.accuracy.teachers=["net/full"]')
    measured(prepared, {"train": 10.0, "center": 40.0, "ten_crop": 4.0})
    assert forecast(prepared, 1).missing == ["hashes"]
    commit.write(prepared.places.storage / "hashes" / prepared.catalogue.fingerprint, lambda folder: None, {})
    found = forecast(prepared, 1)
    alone = sum(job.seconds for job in found.jobs) + found.prediction_seconds
    assert found.seconds == pytest.approx(alone + 20 / 40), "soft labels of 20 images"


def test_cached_features_are_looked_at_once_and_an_epoch_on_them_takes_what_was_measured(
    tmp_path: Path, photos: Path
) -> None:
    (tmp_path / "photos").symlink_to(photos)
    sets = [f'stages.{name}.{said}' for name in ("balanced", "accuracy") for said in (
        'trains="classifier"', 'features="cached"', "epochs=50"
    )]  # fmt: skip
    prepared = prepare(tmp_path, *sets)
    measured(prepared, {"center": 40.0, "ten_crop": 4.0})
    for piece in rates.pieces(prepared, "train"):
        if piece.part == "train":
            speed = 10.0 if piece.job.stage.features == "computed" else 10_000.0
            rates.keep(prepared, piece, {"images_per_second": speed, "device": "NVIDIA H100"})
    found, val = forecast(prepared, 1), len(prepared.catalogue.val)
    full, test = 3 * (20 / 10 + val / 40), len(prepared.catalogue.test) / 4
    heads = 50 * (4 + 20) / 10_000
    looks = (20 + val) / 40  # shared by both stages
    assert found.lower_bound_seconds == pytest.approx(full + looks + heads + test)
    rate = Estimates(prepared).predicting(prepared.jobs["net/accuracy"], "center")
    assert rate is not None
    assert rate.images_per_second == 40, "never what a head alone has told"
    assert demand(prepared).kept["net/balanced"] > 2 * (20 + val) * 256


def test_a_job_that_is_wider_than_the_gpus_is_refused(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "photos").symlink_to(photos)
    with pytest.raises(Refused, match="2 is less than the 4"):
        forecast(prepare(tmp_path, "cluster.ranks=4", "defaults.shares=4"), 2)


def test_jobs_of_several_shares_take_the_gpus_that_are_there(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "photos").symlink_to(photos)
    prepared = prepare(tmp_path, "defaults.shares=4", "stages.full.epochs=3000")
    measured(prepared, {"train": 10.0, "center": 40.0, "ten_crop": 4.0})
    found = forecast(prepared, 4)
    full = found.jobs[0]
    assert full.ranks == (4,), "nothing else could run"
    alone = 3000 * (20 / 10 + len(prepared.catalogue.val) / 40) if prepared.catalogue else 0
    assert full.seconds == pytest.approx(START + alone / speed_up(4))
    assert found.seconds < 1.1 * found.lower_bound_seconds
    one_share = prepare(tmp_path, "stages.full.epochs=3000")
    measured(one_share, {"train": 10.0, "center": 40.0, "ten_crop": 4.0})
    assert forecast(one_share, 4).seconds > 3 * found.seconds


def test_there_is_a_number_for_every_target_whatever_is_known(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "photos").symlink_to(photos)
    prepared = prepare(tmp_path, 'stages.balanced.duplicates="drop"')
    told(prepared, "net/full", 10.0)
    estimates = Estimates(prepared)
    todo = targets(prepared, gpu=True)
    seconds = {name: estimates.seconds(one, 1) for name, one in todo.items()}
    assert all(map(math.isfinite, seconds.values()))
    images = 2 * (20 + len(prepared.read_catalogue().val) / 3)
    assert seconds["net/accuracy"] == pytest.approx(images / 10), "by its pixels, at the pace of net/full"
    assert seconds["net/accuracy test"] == pytest.approx(10 * len(prepared.read_catalogue().test) / 3 / 10)


def test_what_changes_the_cost_of_a_step_is_measured_anew_and_nothing_else(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "photos").symlink_to(photos)

    def digests(*sets: str) -> set[str]:
        return {piece.digest for piece in rates.pieces(prepare(tmp_path, *sets), "train")}

    before = digests()
    assert len(before) == 4, "two objectives, the centre view, ten crops"
    for same in ("defaults.epochs=9", "defaults.lr.backbone=0.5", "seed=7", "defaults.images.per_class=1", "name='x'"):
        assert digests(same) == before
    two_branches = digests("stages.accuracy.objective='bbn'") - before
    assert len(two_branches) == 3, "training, centre, ten crops"
    for other in ("crop=24", "batch_size=2", "shares=2", "precision='bfloat16'", "ema=0.9"):
        assert not {p.digest for p in rates.pieces(prepare(tmp_path, f"defaults.{other}"), "step")} & {
            p.digest for p in rates.pieces(prepare(tmp_path), "step")
        }
    for other in ("cluster.cpus_per_worker=2", "cluster.loader_processes=1", "backbones.net='test_vit.r160_in1k'"):
        assert not digests(other) & before


def test_a_damaged_file_of_rates_tells_nothing(prepared: Opened) -> None:
    measured(prepared, {"train": 10.0, "center": 40.0, "ten_crop": 4.0})
    (prepared.folder / rates.FILE).write_text("{")
    assert forecast(prepared, 1).seconds is None


def target(name: str, needs: Iterable[Target], gpus: int, world_sizes: tuple[int, ...] = (1,)) -> Target:
    return Target(
        kind="training",
        name=name,
        facts={},
        place=name,
        make=lambda target, context: (),
        needs={"needs": tuple(needs)},
        resources=Resources(1, gpus),
        world_sizes=world_sizes,
    )


@st.composite
def works(draw: st.DrawFn) -> dict[Target, float]:
    """Up to 12 targets that fit on the GPUs, each needing some of those before it, with its seconds."""
    found: dict[Target, float] = {}
    for number in range(draw(st.integers(1, 12))):
        needs = draw(st.sets(st.sampled_from(list(found)), max_size=2)) if found else set()
        sizes = draw(st.sampled_from([(1,), (2,), (1, 2, 4)]))
        one = target(f"target {number}", needs, draw(st.integers(0, 1)), sizes)
        found[one] = draw(st.floats(0, 1e6, allow_subnormal=False))
    return found


@settings(max_examples=40, deadline=None)
@given(works(), st.none() | st.integers(1, 3))
def test_no_schedule_beats_the_bound_or_makes_less_than_all(works: dict[Target, float], most: int | None) -> None:
    todo = {one.name: one for one in works}

    def seconds(target: Target, ranks: int) -> float:
        return works[target] / speed_up(ranks)

    spans = simulate(todo, seconds, machines(GPUS), most)
    assert set(spans) == set(todo)
    assert max(one[-1].end for one in spans.values()) >= lower_bound(todo, seconds, GPUS) * (1 - 1e-9)
    for name, one in todo.items():
        assert all(spans[need.name][-1].end <= spans[name][0].begin for need in one.needed())
        begin, end, ranks = spans[name][0]
        if len(spans[name]) == 1:
            assert end == pytest.approx(begin + START + works[one] / speed_up(ranks))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=12))
def test_a_chain_takes_its_sum_and_no_less_is_possible(seconds: list[float]) -> None:
    chain: list[Target] = []
    for number in range(len(seconds)):
        chain.append(target(f"target {number}", chain[-1:], 1))
    todo = {one.name: one for one in chain}
    lasts = dict(zip(chain, seconds, strict=True))
    spans = simulate(todo, lambda target, ranks: lasts[target], machines(GPUS))
    assert max(one[-1].end for one in spans.values()) == pytest.approx(sum(seconds) + len(seconds) * START)
    assert lower_bound(todo, lambda target, ranks: lasts[target], GPUS) == pytest.approx(sum(seconds))


def test_ranks_side_by_side_on_cpus_are_slower_than_one_that_was_measured_alone(prepared: Opened) -> None:
    measured(prepared, {"train": 10.0, "center": 40.0, "ten_crop": 4.0}, device="cpu")
    alone, beside = forecast(prepared, 1).jobs[0], forecast(prepared, 2).jobs[0]
    assert (alone.images_per_second, beside.images_per_second) == (
        10.0,
        pytest.approx(7.1 * speed_up(beside.ranks[-1])),
    )
    told(prepared, "net/full", 8.0, device="cpu")
    assert forecast(prepared, 2).jobs[0].images_per_second == pytest.approx(8.0 * speed_up(beside.ranks[-1]))
