"""forecast: a run's policy with measured rates, its arithmetic written out, and what holds for any plan."""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aliprod.catalogue import sources
from aliprod.errors import Refused
from aliprod.forecast import rates
from aliprod.forecast.bill import Cost, speed_up
from aliprod.forecast.simulate import forecast, lower_bound, simulate
from aliprod.orchestration.prepare import Prepared, opened
from aliprod.orchestration.scheduler import Share
from aliprod.orchestration.steps import Step
from aliprod.plan import graph
from aliprod.plan.load import load
from aliprod.plan.open import Request
from aliprod.plan.places import resolve
from aliprod.store import commit
from aliprod.synth.synth import synthesise

GPUS = 4
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


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalogues") / "photos"
    synthesise(folder, classes=2, images=20, seed=0)
    return folder


@pytest.fixture
def prepared(tmp_path: Path, photos: Path) -> Prepared:
    (tmp_path / "photos").symlink_to(photos)
    return prepare(tmp_path)


def prepare(folder: Path, *sets: str) -> Prepared:
    (folder / "plan.toml").write_text(PLAN)
    plan = load(folder / "plan.toml", sets)
    catalogue = sources.read(folder / "photos")
    request = Request(plan, PLAN, resolve(plan, folder / "runs", None, None))
    return opened(request, catalogue, graph.jobs(plan, catalogue.fingerprint))


def measured(prepared: Prepared, speeds: Mapping[str, float]) -> None:
    """As `aliprod benchmark train PLAN` would keep it."""
    for piece in rates.pieces(prepared, "train"):
        if piece.part in speeds:
            rates.keep(prepared, piece, {"images_per_second": speeds[piece.part], "device": "cpu"})


def told(prepared: Prepared, name: str, *speeds: float, **facts: Any) -> None:
    """Lines of metrics.jsonl, as a training writes them."""
    folder = prepared.job_folder(name)
    folder.mkdir(parents=True)
    lines = [
        {"epoch": epoch, "time_ms": 1_700_000_000_000 + epoch, **facts, "train/loss": 1.0}
        | {"speed/images_per_second": speed, "speed/data_wait_share": 0.1, "speed/memory_bytes": 1e9}
        for epoch, speed in enumerate(speeds)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def finish(prepared: Prepared, name: str, **record: Any) -> None:
    commit.write(prepared.job_folder(name) / "weights", lambda folder: None, record)


def again(prepared: Prepared) -> Prepared:
    return opened(prepared.request, prepared.catalogue, prepared.jobs)


def test_a_job_takes_its_images_at_the_measured_rates(prepared: Prepared) -> None:
    measured(prepared, {"train": 10.0, "center": 40.0, "ten_crop": 4.0})
    found = forecast(prepared, 1)
    catalogue = prepared.catalogue
    full = 3 * (20 / 10 + len(catalogue.val) / 40)  # 5 steps of 4 images an epoch, then val
    balanced = 4 / 10 + len(catalogue.val) / 40  # 2 classes of 2
    accuracy = 2 * (20 / 10 + len(catalogue.val) / 40)
    ten_crop = len(catalogue.test) / 4
    assert [job.seconds for job in found.jobs] == pytest.approx([full, balanced, accuracy])
    assert found.prediction_seconds == pytest.approx(ten_crop)
    assert found.seconds == pytest.approx(full + balanced + accuracy + ten_crop) == found.lower_bound_seconds
    assert found.gpu_hours == pytest.approx(found.seconds / 3600)
    assert {job.source for job in found.jobs} == {"benchmark, cpu"}
    both = forecast(prepared, 2)  # balanced beside accuracy
    assert both.seconds == both.lower_bound_seconds == pytest.approx(full + accuracy + ten_crop)
    assert both.gpu_hours == pytest.approx(found.gpu_hours)


def test_what_a_job_has_told_goes_before_its_twin_and_that_before_the_benchmark(prepared: Prepared) -> None:
    measured(prepared, {"train": 1.0, "center": 40.0, "ten_crop": 4.0})
    told(prepared, "net/full", 5.0, 11.0, 10.0, device="NVIDIA H100", **{"speed/ranks": 1})
    full, balanced, accuracy = forecast(prepared, 1).jobs
    assert (full.images_per_second, full.source) == (10.0, "net/full, NVIDIA H100")
    assert (balanced.images_per_second, balanced.source) == (10.0, "net/full, NVIDIA H100"), "the same step"
    assert (accuracy.images_per_second, accuracy.source) == (1.0, "benchmark, cpu"), "another objective"


def test_what_several_ranks_have_told_is_scaled_to_those_asked_for(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "photos").symlink_to(photos)
    prepared = prepare(tmp_path, "cluster.workers=4")
    told(prepared, "net/full", 70.0, device="NVIDIA H100", **{"speed/ranks": 2})
    full = forecast(prepared, 4).jobs[0]
    assert full.images_per_second == pytest.approx(70.0 * speed_up(4) / speed_up(2))


def test_lines_of_before_are_of_the_ranks_and_the_device_in_the_record(prepared: Prepared) -> None:
    told(prepared, "net/full", 70.0)
    finish(prepared, "net/full", environment={"world_size": 2, "device": "NVIDIA A100"})
    balanced = forecast(again(prepared), 1).jobs[1]
    assert balanced.images_per_second == pytest.approx(70.0 / speed_up(2))
    assert balanced.source == "net/full, NVIDIA A100"


def test_finished_jobs_and_predictions_cost_nothing(prepared: Prepared) -> None:
    measured(prepared, {"train": 10.0, "center": 40.0, "ten_crop": 4.0})
    before = forecast(prepared, 1)
    finish(prepared, "net/full")
    without = forecast(again(prepared), 1)
    assert (without.jobs[0].seconds, without.jobs[0].begin, without.jobs[0].source) == (0.0, None, None)
    assert without.seconds == pytest.approx(before.seconds - before.jobs[0].seconds)
    for name in ("net/balanced", "net/accuracy"):
        finish(prepared, name)
    assert forecast(again(prepared), 1).seconds == pytest.approx(before.prediction_seconds)
    store = prepared.job_folder("net/accuracy") / "probabilities" / f"{'0' * 16}-test"
    commit.write(store, lambda folder: None, {})
    assert forecast(again(prepared), 1).seconds == 0.0


def test_a_job_on_its_way_costs_what_lies_behind_its_newest_checkpoint(prepared: Prepared) -> None:
    measured(prepared, {"train": 10.0, "center": 40.0, "ten_crop": 4.0})
    for step in (5, 7):  # of 15; an epoch has 5
        (prepared.job_folder("net/full") / "resume" / f"step-{step:010d}").mkdir(parents=True)
    full = forecast(prepared, 1).jobs[0]
    assert full.seconds == pytest.approx(8 * 4 / 10 + 2 * len(prepared.catalogue.val) / 40)


def test_without_a_rate_there_is_no_total_and_it_is_said_of_what(prepared: Prepared) -> None:
    told(prepared, "net/full", 10.0)
    found = forecast(prepared, 1)
    assert (found.seconds, found.gpu_hours, found.lower_bound_seconds, found.workers) == (None, None, None, [])
    assert found.missing == ["net/accuracy", "net/accuracy test"]
    full, _, accuracy = found.jobs
    assert (accuracy.seconds, accuracy.begin, accuracy.source) == (None, None, None)
    assert full.seconds == pytest.approx(3 * (20 + len(prepared.catalogue.val)) / 10), "val at no better rate"


def test_what_is_made_for_a_job_is_counted_where_it_can_be_and_named_where_not(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "photos").symlink_to(photos)
    sets = ['stages.balanced.duplicates="drop"', 'stages.accuracy.objective="distillation"']
    prepared = prepare(tmp_path, *sets, 'stages.accuracy.teachers=["net/full"]')
    measured(prepared, {"train": 10.0, "center": 40.0, "ten_crop": 4.0})
    assert forecast(prepared, 1).missing == ["net/balanced hashes"]
    commit.write(prepared.places.storage / "hashes" / prepared.catalogue.fingerprint, lambda folder: None, {})
    found = forecast(prepared, 1)
    alone = sum(job.seconds for job in found.jobs) + found.prediction_seconds
    assert found.seconds == pytest.approx(alone + 20 / 40), "soft labels of 20 images"


def test_a_job_that_is_wider_than_the_gpus_is_refused(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "photos").symlink_to(photos)
    with pytest.raises(Refused, match="2 is less than the 4"):
        forecast(prepare(tmp_path, "cluster.workers=4"), 2)


def test_other_widths_are_those_that_a_batch_can_be_dealt_to(prepared: Prepared) -> None:
    measured(prepared, {"train": 10.0, "center": 40.0, "ten_crop": 4.0})
    found = forecast(prepared, 6)
    assert [width.workers for width in found.workers] == [1, 2, 4], "batches are of 4"
    seconds = [width.seconds for width in found.workers]
    assert seconds[0] == found.seconds
    assert seconds == sorted(seconds, reverse=True), "a chain of jobs with GPUs to spare"


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
    for other in ("crop=24", "batch_size=2", "accumulate=2", "precision='bfloat16'", "ema=0.9"):
        assert not {p.digest for p in rates.pieces(prepare(tmp_path, f"defaults.{other}"), "step")} & {
            p.digest for p in rates.pieces(prepare(tmp_path), "step")
        }
    for other in ("cluster.cpus_per_worker=2", "cluster.loader_processes=1", "backbones.net='test_vit.r160_in1k'"):
        assert not digests(other) & before


def test_a_damaged_file_of_rates_tells_nothing(prepared: Prepared) -> None:
    measured(prepared, {"train": 10.0, "center": 40.0, "ten_crop": 4.0})
    (prepared.folder / rates.FILE).write_text("{")
    assert forecast(prepared, 1).seconds is None


@st.composite
def bills(draw: st.DrawFn) -> list[Cost]:
    """Up to 12 tasks that fit on the GPUs, each needing some of those before it."""
    names = [f"task {number}" for number in range(draw(st.integers(1, 12)))]
    costs = []
    for place, name in enumerate(names):
        needs = draw(st.sets(st.sampled_from(names[:place]), max_size=2)) if place else set()
        seconds = draw(st.floats(0, 1e6, allow_subnormal=False))
        step = Step(name, "train", name, tuple(sorted(needs)), Share(1, draw(st.integers(0, GPUS))))
        costs.append(Cost(step, seconds))
    return costs


@given(bills(), st.integers(0, 12), st.none() | st.integers(1, 3))
def test_no_schedule_beats_the_bound_takes_more_gpus_or_begins_before_its_needs(
    costs: list[Cost], first: int, most: int | None
) -> None:
    phases = [costs[:first], costs[first:]]
    spans = simulate(phases, GPUS, most)
    assert set(spans) == {cost.step.name for cost in costs}
    assert max(end for _, end in spans.values()) >= lower_bound(costs, GPUS) * (1 - 1e-9)
    for cost in costs:
        begin, end = spans[cost.step.name]
        assert end == begin + cost.seconds
        assert all(spans[need][1] <= begin for need in cost.step.needs)
        at_once = [c for c in costs if spans[c.step.name][0] <= begin < spans[c.step.name][1]]
        assert sum(c.step.share.gpus for c in at_once) <= GPUS
        assert most is None or len(at_once) <= most


@given(bills())
def test_a_chain_takes_its_sum_and_no_less_is_possible(costs: list[Cost]) -> None:
    costs = [replace(cost, step=replace(cost.step, needs=())) for cost in costs[:1]] + costs[1:]
    chain = [replace(c, step=replace(c.step, needs=(b.step.name,))) for b, c in pairwise(costs)]
    spans = simulate([[costs[0], *chain]], GPUS)
    total = sum(cost.seconds for cost in costs)
    assert max(end for _, end in spans.values()) == pytest.approx(total)
    assert lower_bound([costs[0], *chain], GPUS) == pytest.approx(total)
