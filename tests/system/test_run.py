"""A whole plan on a real Ray: run, run again, changed, failed, interrupted, with its workers and its driver killed."""

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import timm
from click.testing import CliRunner
from safetensors.torch import save_file

from aliprod.cli import app
from aliprod.ensemble.guesses import read_predictions
from aliprod.inference import probabilities
from aliprod.store import commit, epochs
from aliprod.store.layout import METRICS, newest_step

JOBS = ["resnet/full", "resnet/dcl", "resnet/lio", "resnet/accuracy", "efficientnet/full"]
MEMBERS = ["resnet/dcl", "resnet/lio", "resnet/accuracy", "efficientnet/full"]


@dataclass(frozen=True)
class Run:
    """A storage path after a plan was run in it, and what is then to be compared."""

    storage: Path
    process: subprocess.CompletedProcess[str]
    outcome: dict[str, Any]
    bytes: dict[str, str]


@pytest.fixture(scope="module")
def plan(plan: Path) -> Path:
    """The plan with trainings that last long enough to be killed."""
    longer = plan.with_name("longer.toml")
    longer.write_text(plan.read_text().replace("epochs = 3", "epochs = 8"))
    return longer


def last_line(process: subprocess.CompletedProcess[str]) -> Any:
    assert process.returncode in (0, 1), process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def digests(storage: Path) -> dict[str, str]:
    """sha256 of all that a run computes: weights, probabilities, ensemble, submission; without records of when."""
    found = {"submission": commit.sha256(storage / "tiny" / "submission.csv")}
    folders = [
        *storage.glob("jobs/*/*/*/*"),
        *storage.glob("jobs/*/*/*/probabilities/*"),
        storage / "tiny" / "ensemble",
    ]
    for folder in folders:
        for file in folder.iterdir() if commit.read(folder) is not None else ():
            if file.name != commit.MANIFEST:
                found[file.relative_to(storage).as_posix()] = commit.sha256(file)
    return found


def checkpoints(storage: Path) -> set[Path]:
    return {path for path in storage.glob("jobs/*/*/*/resume/step-*") if commit.read(path) is not None}


def times(storage: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in storage.glob("jobs/**/*")}


def mlflow_of(storage: Path) -> Any:
    from aliprod.tracking.server import reach

    return reach(f"sqlite:///{storage / 'mlflow.db'}").client


@pytest.fixture(scope="module")
def whole(cluster: Any, plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    storage = tmp_path_factory.mktemp("whole")
    process = cluster.aliprod("run", plan, "--storage", storage, "--json")
    return Run(storage, process, last_line(process), digests(storage))


# An undisturbed run


def test_a_plan_is_run_to_its_end(whole: Run) -> None:
    assert whole.process.returncode == 0
    assert whole.outcome["trained"] == JOBS
    assert whole.outcome["reused"] == whole.outcome["failed"] == whole.outcome["not_run"] == []
    ensemble = whole.outcome["ensemble"]
    assert set(whole.outcome) == {"plan", "trained", "reused", "failed", "not_run", "ensemble"}
    assert set(ensemble) == {"members", "top1_error", "split", "submission", "probabilities", "comparison"}
    assert ensemble["comparison"]["ensemble"]["top1_error"] == ensemble["top1_error"]
    assert list(ensemble["members"]) == MEMBERS
    assert {frozenset(member) for member in ensemble["members"].values()} == {frozenset({"top1_error", "version"})}
    assert json.loads((whole.storage / "tiny" / "result.json").read_text()) == whole.outcome


def test_the_submission_has_every_test_image_once_and_a_class_of_the_catalogue(whole: Run, plan: Path) -> None:
    header, *lines = (whole.storage / "tiny" / "submission.csv").read_text().splitlines()
    listed = json.loads((plan.parent / "catalogue" / "test.json").read_text())["images"]
    labels = json.loads((plan.parent / "catalogue" / "train.json").read_text())["images"]
    assert header == "id,predicted"
    assert sorted(line.split(",")[0] for line in lines) == sorted(row["image_id"] for row in listed)
    assert {int(line.split(",")[1]) for line in lines} <= {int(row["class_id"]) for row in labels}


def test_the_prediction_is_the_highest_sum_of_the_members_probabilities(whole: Run) -> None:
    folders = [next(whole.storage.glob(f"jobs/{name}/*/probabilities/*-test")) for name in MEMBERS]
    stores = [probabilities.open_store(folder) for folder in folders]
    total = sum(store.take(np.arange(len(store))).astype(np.float64) for store in stores)
    expected = dict(zip(stores[0].ids.to_pylist(), stores[0].classes[np.argmax(total, axis=1)].tolist(), strict=True))
    written = read_predictions(whole.storage / "tiny" / "ensemble")
    assert dict(zip(written.ids.to_pylist(), written.predicted.tolist(), strict=True)) == expected


def test_the_error_that_is_told_is_the_one_counted_from_the_submission(whole: Run, plan: Path) -> None:
    rows = json.loads((plan.parent / "catalogue" / "test_labels.json").read_text())["images"]
    truth = {row["image_id"]: int(row["class_id"]) for row in rows}
    lines = (whole.storage / "tiny" / "submission.csv").read_text().splitlines()[1:]
    predicted = {image: int(class_id) for image, class_id in (line.split(",") for line in lines)}
    errors = [
        np.mean([predicted[image] != truth[image] for image in truth if truth[image] == class_id])
        for class_id in set(truth.values())
    ]
    assert whole.outcome["ensemble"]["split"] == "test"
    assert whole.outcome["ensemble"]["top1_error"] == pytest.approx(np.mean(errors))


def test_a_run_leaves_a_report_of_its_members(whole: Run) -> None:
    written = (whole.storage / "tiny" / "report.html").read_text(encoding="utf-8")
    assert f"{whole.outcome['ensemble']['top1_error']:.2%}" in written
    assert all(f"{name} \N{BLACK STAR}" in written for name in MEMBERS)


def test_a_copy_of_the_submission_is_traced_to_the_weights_that_made_it(whole: Run, tmp_path: Path) -> None:
    copy = tmp_path / "mailed.csv"
    copy.write_bytes((whole.storage / "tiny" / "submission.csv").read_bytes())
    asked = CliRunner().invoke(app, ["trace", str(copy), "--storage", str(whole.storage), "--json"])
    traced = json.loads(asked.stdout)
    assert set(traced) >= {"submission", "members", "plan", "catalogue"}
    for name in MEMBERS:
        [weights] = whole.storage.glob(f"jobs/{name}/*/weights/model.safetensors")
        assert traced["members"][name]["weights"] == commit.sha256(weights)
        assert traced["members"][name]["key"] == weights.parts[-3]
        config = json.loads(weights.with_name("config.json").read_text())
        assert traced["members"][name]["epoch"] == config["epoch"] + 1  # as people, MLflow and the table count


def test_mlflow_holds_a_run_for_each_job_below_the_plans(whole: Run) -> None:
    client = mlflow_of(whole.storage)
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id])
    jobs = {run.data.tags["aliprod.job"]: run for run in runs if "aliprod.job" in run.data.tags}
    folders = {f"{path.parts[-3]}/{path.parts[-2]}": path for path in whole.storage.glob("jobs/*/*/*")}
    parents = {run.data.tags.get("mlflow.parentRunId") for run in jobs.values()}
    assert {name: run.data.tags["aliprod.key"] for name, run in jobs.items()} == {
        name: folder.name for name, folder in folders.items()
    }
    assert len(parents) == 1
    assert client.get_run(parents.pop()).info.status == "FINISHED"
    for name, run in jobs.items():
        points = client.get_metric_history(run.info.run_id, "val/top1_error")
        told = {line["epoch"] + 1: line["val/top1_error"] for line in epochs.read(folders[name] / METRICS)}
        assert {point.step: point.value for point in points} == told
        assert len(points) == len(told)


def test_mlflow_holds_every_checkpoint_as_a_version_and_marks_the_best_as_member(whole: Run) -> None:
    client = mlflow_of(whole.storage)
    for name in JOBS:
        model = f"tiny.{name.replace('/', '.')}"
        folder = next(whole.storage.glob(f"jobs/{name}/*"))
        kept = {commit.sha256(path) for path in folder.glob("*/model.safetensors")}
        versions = client.search_model_versions(f"name = '{model}'")
        assert {version.tags["sha256"] for version in versions} == kept
        best = client.get_model_version_by_alias(model, "member")
        assert best.tags["sha256"] == commit.sha256(folder / "weights" / "model.safetensors")


def test_mlflow_has_what_the_ensemble_confuses_as_a_picture(whole: Run) -> None:
    client = mlflow_of(whole.storage)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    [ensemble] = client.search_runs([experiment], "tags.`aliprod.kind` = 'ensemble'")
    assert any(file.path.endswith(".png") for file in client.list_artifacts(ensemble.info.run_id, "images"))
    assert ensemble.data.tags["mlflow.loggedImages"] == "True"


def test_the_dashboard_names_every_job(whole: Run, cluster: Any) -> None:
    tasks = cluster.ask("/api/v0/tasks?limit=9999&detail=1")["data"]["result"]["result"]
    runs = cluster.ask("/api/train/v2/runs/v1")["train_runs"]
    assert {*JOBS, "ensemble", "resnet/dcl test"} <= {task["name"] for task in tasks}
    assert {name.replace("/", ".") for name in JOBS} <= {run["name"].rpartition("-")[0] for run in runs}


# Once more


def test_a_second_run_trains_nothing_and_touches_no_job(whole: Run, cluster: Any, plan: Path) -> None:
    before = times(whole.storage)
    outcome = last_line(cluster.aliprod("run", plan, "--storage", whole.storage, "--json"))
    assert outcome == whole.outcome | {"trained": [], "reused": JOBS}
    assert times(whole.storage) == before
    assert digests(whole.storage) == whole.bytes


def test_a_changed_stage_is_trained_again_and_nothing_else(whole: Run, cluster: Any, plan: Path) -> None:
    before = times(whole.storage)
    changed = ["--set", "stages.lio.seed=1", "--set", 'name="changed"']
    outcome = last_line(cluster.aliprod("run", plan, "--storage", whole.storage, "--json", *changed))
    assert outcome["trained"] == ["resnet/lio"]
    assert outcome["reused"] == [name for name in JOBS if name != "resnet/lio"]
    touched = {path for path, time in times(whole.storage).items() if before.get(path) != time}
    assert {path.relative_to(whole.storage / "jobs").parts[:2] for path in touched} == {("resnet", "lio")}


def test_a_job_that_fails_for_good_stops_its_descendants_alone(whole: Run, cluster: Any, plan: Path) -> None:
    sets = ["--set", "stages.dcl.optimizer.weight_decay=1e38", "--set", "stages.lio.seed=2", "--set", 'name="failing"']
    process = cluster.aliprod("run", plan, "--storage", whole.storage, "--json", *sets)
    outcome = last_line(process)
    assert process.returncode == 1
    assert (outcome["failed"], outcome["not_run"]) == (["resnet/dcl"], ["resnet/accuracy"])
    assert (outcome["trained"], outcome["reused"]) == (["resnet/lio"], ["resnet/full", "efficientnet/full"])
    assert outcome["ensemble"] is None
    left = sorted(path.name for path in (whole.storage / "failing").iterdir())
    assert left == ["forecast.json", "report.html", "result.json", "state.json"]
    assert "Error: resnet/dcl failed: the loss or its gradient is not finite in epoch 1, step" in process.stderr
    assert "Traceback" not in process.stderr


def test_an_ensemble_is_made_where_what_failed_is_none_of_its_members(
    whole: Run, cluster: Any, plan: Path, tmp_path: Path
) -> None:
    """A job, and a probe that the ensemble would have been compared with."""
    backbone = timm.create_model("test_resnet", num_classes=0)
    save_file(backbone.state_dict(), tmp_path / "test_resnet.r160_in1k.safetensors")
    probe = f'{{pretrained = "{tmp_path}", features = "cached", trains = "classifier"}}'
    said = {
        "name": '"unrelated"',
        "jobs.resnet": '["full", "dcl", "lio", "accuracy", "probe"]',
        "stages.probe": probe,
        "stages.probe.optimizer.weight_decay": "1e38",
        "stages.dcl.optimizer.weight_decay": "1e38",
        "ensemble.members": '["resnet/lio", "efficientnet/full"]',
    }
    sets = [word for name, value in said.items() for word in ("--set", f"{name}={value}")]
    sets += ["--storage", str(whole.storage), "--json"]
    process = cluster.aliprod("run", plan, *sets)
    outcome = last_line(process)
    assert (process.returncode, outcome["not_run"]) == (1, ["resnet/accuracy"]), process.stderr
    assert sorted(outcome["failed"]) == ["resnet/dcl", "resnet/probe"]
    assert set(outcome["ensemble"]["members"]) == {"resnet/lio", "efficientnet/full"}
    assert outcome["ensemble"]["comparison"]["floors"] == {}
    assert "The ensemble was made: it needs none of them." in process.stderr

    def told() -> dict[str, tuple[str, str | None]]:
        return {
            job["name"]: (job["state"], job["reason"])
            for job in last_line(cluster.aliprod("status", plan, *sets))["jobs"]
        }

    before = told()
    state, reason = before["resnet/dcl"]
    assert (state, before["resnet/accuracy"]) == ("failed", ("not_run", "resnet/dcl failed"))
    assert "not finite" in str(reason)
    again = cluster.aliprod("ensemble", plan, *sets)
    assert (again.returncode, last_line(again)) == (0, outcome["ensemble"])
    assert told() == before, "what failed is still known"


def test_the_ensemble_takes_the_version_that_a_person_has_chosen(whole: Run, cluster: Any, plan: Path) -> None:
    client, model = mlflow_of(whole.storage), "tiny.resnet.accuracy"
    [last] = [one for one in client.search_model_versions(f"name = '{model}'") if one.tags["checkpoint"] == "last"]
    client.set_registered_model_alias(model, "member", last.version)
    ensemble = last_line(cluster.aliprod("ensemble", plan, "--storage", whole.storage, "--json"))
    assert ensemble["members"]["resnet/accuracy"]["version"] == int(last.version)
    stores = {
        name: probabilities.open_store(next(whole.storage.glob(f"jobs/{name}/*/probabilities/{sha[:16]}-test")))
        for name in MEMBERS
        for sha in [client.get_model_version_by_alias(f"tiny.{name.replace('/', '.')}", "member").tags["sha256"]]
    }
    assert stores["resnet/accuracy"].record["weights"] == last.tags["sha256"]
    total = sum(store.take(np.arange(len(store))).astype(np.float64) for store in stores.values())
    highest = stores["resnet/dcl"].classes[np.argmax(total, axis=1)].tolist()
    written = read_predictions(whole.storage / "tiny" / "ensemble")
    expected = dict(zip(stores["resnet/dcl"].ids.to_pylist(), highest, strict=True))
    assert dict(zip(written.ids.to_pylist(), written.predicted.tolist(), strict=True)) == expected


# Disturbed


@dataclass
class Disturbed:
    """What was done to a plan on its way, and how it ended."""

    storage: Path
    statuses: tuple[int, int, int]  # of the driver that was interrupted, of the one that was killed, of the last
    seconds: float  # that the first took to end, less its slowest step
    lost: dict[Path, tuple[int, int]]  # of each job then: the step that it had told of, its newest checkpoint
    rival: str  # the log of the one that waited for the killed one
    workers_killed: int
    resumed: dict[str, int]
    launchers: list[int]  # process ids: of the one that was killed, of the one in its place
    outcome: dict[str, Any]


@pytest.fixture(scope="module")
def disturbed(cluster: Any, plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    """Interrupted at its first checkpoint; started again, twice at once; workers killed, driver killed; finished by the
    other driver, whose launcher is killed."""
    storage = tmp_path_factory.mktemp("disturbed")
    command = ("run", plan, "--storage", storage, "--json")
    before = cluster.left()
    first = cluster.start(*command)
    cluster.until(lambda: checkpoints(storage), first)
    began = time.monotonic()
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    seconds = time.monotonic() - began
    paces = {folder: found for folder in storage.glob("jobs/*/*/*") if (found := epochs.pace(folder))}
    seconds -= max(8 / found["images_per_second"] for found in paces.values())
    lost = {folder: (found["step"], newest_step(folder) or 0) for folder, found in paces.items()}
    cluster.until(lambda: cluster.left() == before, seconds=30)

    second = cluster.start(*command)
    cluster.until((storage / ".leases" / "plan-tiny").is_dir, second)
    rival = cluster.start(*command)
    cluster.until(cluster.workers, second)
    seen = checkpoints(storage)
    cluster.until(lambda: checkpoints(storage) - seen, second)
    workers = cluster.workers()  # those of now: one that began later would not be killed, and need not start again
    for worker in workers:
        worker.kill()
    killed = len(workers)
    at_kill = {
        path.parent.parent: path.name
        for path in sorted(checkpoints(storage) - seen)
        if commit.read(path.parents[1] / "weights") is None
    }
    cluster.until(lambda: any(_further(folder, at) for folder, at in at_kill.items()), second)
    resumed = {"/".join(folder.parts[-3:-1]): int(at.removeprefix("step-")) for folder, at in at_kill.items()}
    gone = launchers(cluster)
    os.killpg(second.pid, signal.SIGKILL)
    second.communicate()

    cluster.until(lambda: (now := launchers(cluster)) and not set(now) & set(gone), rival)
    seen = checkpoints(storage)
    cluster.until(lambda: checkpoints(storage) - seen, rival)
    left, launched = cluster.workers(), launchers(cluster)
    psutil.Process(launched[0]).kill()
    cluster.until(lambda: not any(worker.is_running() for worker in left), rival, seconds=60)
    cluster.until(lambda: set(launchers(cluster)) - set(launched), rival)
    launched += launchers(cluster)
    out, log = rival.communicate(timeout=900)
    last = subprocess.CompletedProcess(command, rival.returncode, out, log)
    statuses = (first.returncode, second.returncode, rival.returncode)
    return Disturbed(storage, statuses, seconds, lost, log, killed, resumed, launched, last_line(last))


def launchers(cluster: Any) -> list[int]:
    """Process ids of those that live."""
    actors = cluster.ask("/api/v0/actors?limit=999&detail=1")["data"]["result"]["result"]
    return [actor["pid"] for actor in actors if (actor["class_name"], actor["state"]) == ("Launcher", "ALIVE")]


def _further(folder: Path, checkpoint: str) -> bool:
    """Whether a job has committed a later checkpoint, or its weights."""
    later = any(path.name > checkpoint for path in checkpoints(folder.parents[3]) if path.parent.parent == folder)
    return later or commit.read(folder / "weights") is not None


def test_an_interrupted_run_soon_exits_with_130_loses_no_step_and_goes_on_later(disturbed: Disturbed) -> None:
    assert disturbed.statuses[0] == 130
    assert disturbed.seconds < 10
    assert disturbed.lost
    assert all(checkpoint >= told for told, checkpoint in disturbed.lost.values())
    assert disturbed.outcome["failed"] == disturbed.outcome["not_run"] == []


def test_a_second_driver_of_a_plan_waits_for_the_first_and_takes_over_when_that_is_killed(disturbed: Disturbed) -> None:
    assert f"Waiting for {os.uname().nodename} pid" in disturbed.rival
    assert f"of plan tiny, which is at work in {disturbed.storage}" in disturbed.rival
    assert disturbed.outcome["trained"]


def test_a_killed_worker_is_started_again_by_ray(disturbed: Disturbed, cluster: Any) -> None:
    assert disturbed.workers_killed >= 1
    runs = cluster.ask("/api/train/v2/runs/v1")["train_runs"]
    here = [run for run in runs if str(disturbed.storage) in run["run_settings"]["run_config"]["storage_path"]]
    again = {run["name"].rpartition("-")[0] for run in here if len(run["attempts"]) > 1}
    assert again & {name.replace("/", ".") for name in disturbed.resumed}


def test_a_killed_launcher_is_replaced_and_its_jobs_go_on(disturbed: Disturbed) -> None:
    killed, after = disturbed.launchers
    assert killed != after
    assert disturbed.statuses[2] == 0
    assert disturbed.outcome["failed"] == disturbed.outcome["not_run"] == []
    assert all(commit.read(folder) is not None for folder in disturbed.storage.glob("jobs/*/*/*/weights"))


def test_a_killed_driver_leaves_nothing_that_trains(disturbed: Disturbed, cluster: Any) -> None:
    assert disturbed.statuses[1] == -signal.SIGKILL
    assert [worker for worker in cluster.workers() if worker.is_running()] == []


def test_no_disturbance_changes_a_byte(disturbed: Disturbed, whole: Run) -> None:
    assert digests(disturbed.storage) == whole.bytes


def test_no_disturbance_tells_an_epoch_twice(disturbed: Disturbed) -> None:
    for file in disturbed.storage.glob("jobs/*/*/*/metrics.jsonl"):
        epochs = [json.loads(line)["epoch"] for line in file.read_text().splitlines()]
        assert epochs == list(range(len(epochs)))
    client = mlflow_of(disturbed.storage)
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    for run in runs:
        if "aliprod.job" in run.data.tags:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, "val/top1_error")]
            assert sorted(steps) == sorted(set(steps))
            assert run.info.status == "FINISHED"
