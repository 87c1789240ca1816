"""What MLflow shows of a plan, read back with its own client."""

import json
import math
import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from functools import partial

import pytest
from mlflow import MlflowClient

from aliprod.errors import Refused, Unreachable
from aliprod.store import commit
from aliprod.tracking import runs, server, sync
from aliprod.tracking.registry import Choice
from aliprod.tracking.runs import EnsembleResult, JobProgress
from aliprod.tracking.sync import Tracking


def run_of(client, kind, **tags):
    experiment = client.get_experiment_by_name("shop").experiment_id
    wanted = " and ".join(f"tags.`aliprod.{k}` = '{v}'" for k, v in {"kind": kind, **tags}.items())
    runs = client.search_runs([experiment], wanted)
    assert len(runs) == 1
    return runs[0]


def everything(client):
    """Counts of all that a sender could have written twice."""
    experiment = client.get_experiment_by_name("shop").experiment_id
    runs = client.search_runs([experiment])
    points = Counter(
        (run.info.run_id, name, point.step, point.timestamp, point.value)
        for run in runs
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    )
    versions = sorted(
        (v.name, v.version, v.source, tuple(sorted(v.tags.items()))) for v in client.search_model_versions()
    )
    models = [m.model_id for m in client.search_logged_models([experiment])]
    aliases = {m.name: (dict(m.aliases), dict(m.tags)) for m in client.search_registered_models()}
    tags = sorted((run.info.run_id, name, value) for run in runs for name, value in run.data.tags.items())
    return {"points": points, "versions": versions, "models": sorted(models), "aliases": aliases, "tags": tags}


def test_a_trained_job_is_a_run_below_the_plans_with_its_settings_and_every_point(place, job, trained):
    tracking, full = place.driver(), job()
    folder = trained(full)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for state in ("running", "finished"):
        place.show(tracking, JobProgress(full, folder, state))
        assert tracking.flush(60) == []

    client = MlflowClient(place.uri)
    run, plan = run_of(client, "job", key=full.key), run_of(client, "plan")
    assert run.data.tags["mlflow.parentRunId"] == plan.info.run_id
    assert run.data.tags["aliprod.job"] == "resnet50/full"
    assert run.data.tags["aliprod.host"] == os.uname().nodename
    assert run.data.tags["aliprod.result"] == commit.digest(folder / "weights")
    assert run.info.status == "FINISHED"
    assert run.data.params["epochs"] == "3"
    assert run.data.params["lr.backbone"] == "0.01"
    assert run.data.params["objective.name"] == "cross_entropy"
    for name in ("train/class", "val/top1_error"):
        history = client.get_metric_history(run.info.run_id, name)
        assert [(p.step, p.timestamp, p.value) for p in history] == [
            (r["epoch"] + 1, r["time_ms"], r[name]) for r in records
        ]
    lowest = client.get_metric_history(run.info.run_id, "best/top1_error")
    assert [(p.step, p.value) for p in lowest] == [(1, 0.5), (2, 0.2), (3, 0.2)]
    assert run.data.tags["aliprod.state"] == "finished"
    assert (run.data.tags["aliprod.epoch"], run.data.tags["aliprod.best_epoch"]) == ("3/3", "2")
    errors = client.get_metric_history(plan.info.run_id, "top1_error/resnet50/full")
    assert [p.value for p in errors] == [0.5, 0.2, 0.3]
    assert plan.data.tags["mlflow.note.content"].startswith("| job | state |")


def test_a_jobs_run_names_the_data_that_it_is_trained_on_once(place, job, packages):
    for _ in range(2):
        tracking = place.driver()
        place.show(tracking, JobProgress(job(), place.storage, "running"), catalogue=packages)
        assert tracking.flush(60) == []
    run = run_of(MlflowClient(place.uri), "job")
    [data] = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == (packages.root.name, packages.fingerprint[:12])
    assert json.loads(data.dataset.profile) == {"train": len(packages.train), "val": len(packages.val),
                                                "test": len(packages.test), "classes": 4}  # fmt: skip
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "training")]


def test_a_run_names_the_commit_of_the_sources_where_they_are_a_checkout(place, monkeypatch):
    monkeypatch.setattr(runs, "revision", lambda: "c0ffee")
    assert place.driver().flush(60) == []
    assert run_of(MlflowClient(place.uri), "plan").data.tags["mlflow.source.git.commit"] == "c0ffee"


def test_the_plans_description_and_its_page_lead_to_a_saved_view_of_the_jobs(place):
    tracking = place.driver()
    assert tracking.flush(60) == []
    client = MlflowClient(place.uri)
    experiment = client.get_experiment_by_name("shop")
    page = f"#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey=aliprod"
    note = run_of(client, "plan").data.tags["mlflow.note.content"]
    assert f"({page})" in note
    assert f"({page}&compareRunsMode=CHART)" in note
    assert page in tracking.page
    state = json.loads(json.loads(experiment.tags["mlflow.sharedViewState.aliprod"])["state"])
    found = client.search_runs([experiment.experiment_id], state["searchFilter"])
    assert found == [], "jobs and ensembles alone"


def test_a_reused_job_that_mlflow_lacks_is_sent_whole_and_the_second_time_writes_nothing(place, job, trained):
    full = job()
    folder = trained(full)
    client = MlflowClient(place.uri)
    seen = []
    for _ in range(3):
        tracking = place.driver()
        for state in ("waiting", "reused", "reused"):
            place.show(tracking, JobProgress(full, folder, state))
            assert tracking.flush(60) == []
        seen.append(everything(client))
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]["versions"]) == 2
    assert len(seen[0]["models"]) == 2
    assert set(seen[0]["points"].values()) == {1}
    run = run_of(client, "job")
    assert run.data.tags["aliprod.result"] == commit.digest(folder / "weights")
    assert min(p.timestamp for p in client.get_metric_history(run.info.run_id, "train/class")) == 1_700_000_000_000


def test_an_epoch_told_again_after_a_resume_draws_no_second_point(place, job):
    full = job()
    for time_ms in (1000, 2000):  # the second driver trains the epoch again, at another time
        tracking = place.driver()
        folder = place.metrics({"epoch": 0, "time_ms": time_ms, "train/class": 1.5})
        place.show(tracking, JobProgress(full, folder, "running"))
        assert tracking.flush(60) == []
    client = MlflowClient(place.uri)
    history = client.get_metric_history(run_of(client, "job").info.run_id, "train/class")
    assert [(p.step, p.timestamp, p.value) for p in history] == [(1, 1000, 1.5)]


def test_a_driver_killed_before_the_result_tag_is_completed_by_the_next(place, job, trained):
    full = job()
    folder = trained(full)
    tracking = place.driver()
    place.show(tracking, JobProgress(full, folder, "finished"))
    assert tracking.flush(60) == []
    client = MlflowClient(place.uri)
    versions = everything(client)["versions"]
    client.delete_tag(run_of(client, "job").info.run_id, "aliprod.result")

    tracking = place.driver()
    place.show(tracking, JobProgress(full, folder, "finished"))
    assert tracking.flush(60) == []
    assert run_of(client, "job").data.tags["aliprod.result"] == commit.digest(folder / "weights")
    assert everything(client)["versions"] == versions
    assert set(everything(client)["points"].values()) == {1}


def test_of_two_runs_that_two_drivers_made_for_a_key_the_oldest_is_completed(place, job, trained):
    full, tracking = job(), place.driver()
    place.show(tracking, JobProgress(full, place.storage, "running"))
    assert tracking.flush(60) == []
    client = MlflowClient(place.uri)
    first = run_of(client, "job")
    tags = {name: value for name, value in first.data.tags.items() if name.startswith("aliprod.")}
    second = client.create_run(first.info.experiment_id, first.info.start_time + 1, tags)
    tracking = place.driver()
    place.show(tracking, JobProgress(full, trained(full), "finished"))
    assert tracking.flush(60) == []
    assert "aliprod.result" in client.get_run(first.info.run_id).data.tags
    assert client.get_run(second.info.run_id).info.lifecycle_stage == "deleted"


def test_a_run_that_was_made_long_after_nobody_waited_for_it_is_the_only_one_in_the_end(place, job, trained):
    tracking = place.driver()
    assert tracking.flush(60) == []
    client, full = tracking._server.client, job()
    make, late = client.create_run, []

    def timed_out(*arguments, **named):
        client.create_run = make
        late.append(partial(make, *arguments, **named))
        raise OSError("Read timed out")

    client.create_run = timed_out
    folder = place.metrics({"epoch": 0, "time_ms": 1, "train/class": 1.5})
    place.show(tracking, JobProgress(full, folder, "running"))
    assert tracking.flush(60) == []
    for creation in late:
        creation()
    place.show(tracking, JobProgress(full, trained(full), "finished"))
    assert tracking.flush(60) == []
    assert late
    assert sorted(value for _, name, value in everything(client)["tags"] if name == "aliprod.kind") == ["job", "plan"]
    assert set(everything(client)["points"].values()) == {1}


def test_epochs_of_a_running_job_arrive_as_its_training_writes_them(place, job, monkeypatch):
    monkeypatch.setattr(sync, "LOOK_SECONDS", 0.2)
    full, tracking, client = job(), place.driver(), MlflowClient(place.uri)
    records = [{"epoch": epoch, "time_ms": 1000 + epoch, "train/class": 2.0 - epoch} for epoch in range(3)]
    place.show(tracking, JobProgress(full, place.metrics(*records[:1]), "running"))
    assert tracking.flush(60) == []
    run_id, until = run_of(client, "job").info.run_id, time.monotonic() + 30
    place.metrics(*records)
    while len(history := client.get_metric_history(run_id, "train/class")) < 3:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert [(p.step, p.timestamp, p.value) for p in history] == [(1, 1000, 2.0), (2, 1001, 1.0), (3, 1002, 0.0)]
    place.metrics(*records, {"epoch": 3, "time_ms": 1003, "train/class": -1.0})
    assert tracking.flush(60) == [], "flush looks once more"
    assert len(client.get_metric_history(run_id, "train/class")) == 4


def test_a_point_whose_answer_was_lost_is_not_sent_twice(place, job):
    tracking = place.driver()
    assert tracking.flush(60) == []
    client = tracking._server.client
    send = client.log_batch

    def lost(*arguments, **named):
        client.log_batch = send
        send(*arguments, **named)
        raise OSError("Connection reset")

    client.log_batch = lost
    folder = place.metrics({"epoch": 0, "time_ms": 1, "train/class": 1.5})
    place.show(tracking, JobProgress(job(), folder, "running"))
    assert tracking.flush(60) == []
    assert client.log_batch is send, "an answer was lost: that of the settings"
    client.log_batch = lost
    folder = place.metrics(*({"epoch": epoch, "time_ms": 1 + epoch, "train/class": 1.5} for epoch in range(2)))
    assert tracking.flush(60) == []
    assert client.log_batch is send, "an answer was lost: that of the second epoch"
    points = everything(client)["points"]
    assert [point[1:3] for point in points] == [("train/class", 1), ("train/class", 2)]
    assert set(points.values()) == {1}


def test_values_that_are_not_finite_become_tags_and_the_others_points(place, job):
    full, tracking = job(), place.driver()
    folder = place.metrics({"epoch": 0, "time_ms": 1, "train/class": math.inf, "val/top1_error": 0.5, "lr": math.nan})
    place.show(tracking, JobProgress(full, folder, "running"))
    assert tracking.flush(60) == []
    client = MlflowClient(place.uri)
    run = run_of(client, "job")
    assert run.data.metrics == {"val/top1_error": 0.5, "best/top1_error": 0.5}
    assert run.data.tags["aliprod.nonfinite.train/class"] == "inf in epoch 1"
    assert run.data.tags["aliprod.nonfinite.lr"] == "nan in epoch 1"


def test_a_failed_job_says_why_until_it_is_started_again(place, job):
    full, tracking = job(), place.driver()
    place.show(tracking, JobProgress(full, place.storage, "failed", "resnet50/full: the loss is NaN at step 7."))
    assert tracking.flush(60) == []
    client = MlflowClient(place.uri)
    assert run_of(client, "job").info.status == "FAILED"
    assert run_of(client, "job").data.tags["aliprod.error"] == "resnet50/full: the loss is NaN at step 7."
    tracking = place.driver()
    place.show(tracking, JobProgress(full, place.storage, "running"))
    assert tracking.flush(60) == []
    assert run_of(client, "job").info.status == "RUNNING"
    assert "aliprod.error" not in run_of(client, "job").data.tags


def test_a_job_that_was_stopped_is_scheduled_and_none_runs_on_when_its_plan_was_interrupted(place, job):
    full, client, tracking = job(), MlflowClient(place.uri), place.driver()
    seen = []
    for state, plan in (("running", "RUNNING"), ("waiting", "RUNNING"), ("running", "RUNNING"), ("waiting", "KILLED")):
        place.show(tracking, JobProgress(full, place.storage, state), status=plan)
        assert tracking.flush(60) == []
        seen.append(run_of(client, "job").info.status)
    place.show(tracking, JobProgress(full, place.storage, "running"), status="KILLED")
    assert tracking.flush(60) == []
    assert [*seen, run_of(client, "job").info.status] == ["RUNNING", "SCHEDULED", "RUNNING", "KILLED", "KILLED"]


def test_a_trained_job_whose_prediction_failed_keeps_its_run_and_is_finished_once_reused(place, job, trained):
    full, client = job(), MlflowClient(place.uri)
    folder = trained(full)
    for state, detail in (("finished", ""), ("failed", "test: it holds NaN"), ("reused", "")):
        tracking = place.driver()
        place.show(tracking, JobProgress(full, folder, state, detail))
        assert tracking.flush(60) == []
        run = run_of(client, "job")
        assert run.info.status == ("FAILED" if detail else "FINISHED")
        assert run.data.tags.get("aliprod.error", "") == detail
        assert run.data.tags["aliprod.result"] == commit.digest(folder / "weights")


def test_a_plans_run_ends_and_runs_again_and_keeps_its_file(place):
    client = MlflowClient(place.uri)
    for status in ("FAILED", "RUNNING", "KILLED", "FINISHED"):
        tracking = place.driver()
        place.show(tracking, status=status)
        assert tracking.flush(60) == []
        run = run_of(client, "plan")
        assert run.info.status == status
    assert client.list_artifacts(run.info.run_id)[0].path == "plan.toml"


def test_a_job_trained_again_to_other_bytes_gets_a_run_of_its_own(place, job, trained, tmp_path):
    full = job()
    folder = trained(full)
    tracking = place.driver()
    place.show(tracking, JobProgress(full, folder, "finished"))
    assert tracking.flush(60) == []
    folder.rename(tmp_path / "lost")
    folder = trained(full, content="other bytes")
    tracking = place.driver()
    place.show(tracking, JobProgress(full, folder, "running"))
    assert tracking.flush(60) == []
    place.show(tracking, JobProgress(full, folder, "finished"))
    assert tracking.flush(60) == []
    client = MlflowClient(place.uri)
    assert run_of(client, "job").data.tags["aliprod.result"] == commit.digest(folder / "weights")
    assert run_of(client, "superseded").data.tags["aliprod.result"] == commit.digest(tmp_path / "lost" / "weights")
    best = client.get_model_version_by_alias("shop.resnet50.full", "member")
    assert best.tags["sha256"] == commit.digests(folder / "weights")["model.safetensors"]


def test_a_run_deleted_by_a_person_while_the_job_trains_is_made_anew(place, job, trained):
    full, tracking = job(), place.driver()
    folder = trained(full)
    place.show(tracking, JobProgress(full, place.storage, "running"))
    assert tracking.flush(60) == []
    client = MlflowClient(place.uri)
    client.delete_run(run_of(client, "job").info.run_id)
    place.show(tracking, JobProgress(full, folder, "finished"))
    assert tracking.flush(60) == []
    assert run_of(client, "job").data.metrics["best/top1_error"] == 0.2


def test_what_the_plan_file_says_about_passwords_does_not_reach_mlflow(place):
    tracking = Tracking(place.uri, "shop", place.storage / "mlartifacts", place.lines.append)
    place.show(tracking, text='tracking_uri = "http://ann:hunter2@mlflow:5000"\n', note="see http://ann:hunter2@mlflow")
    assert tracking.flush(60) == []
    stored = [path.read_bytes() for path in place.storage.rglob("*") if path.is_file()]
    assert any(b"http://mlflow:5000" in content for content in stored)
    assert not any(b"hunter2" in content for content in stored)


def test_only_the_last_of_waiting_tables_is_sent_and_a_long_one_ends_at_a_line(place):
    tracking = place.driver()
    for number in range(200):
        place.show(tracking, note=f"{number}\n" + "| a row of the table |\n" * 1000)
    assert tracking.flush(60) == []
    note = run_of(MlflowClient(place.uri), "plan").data.tags["mlflow.note.content"]
    assert note.startswith("199\n")
    assert len(note) <= 8000
    assert note.endswith("| a row of the table |\n...")


def test_an_ensemble_names_each_members_version_and_bytes(place, job, trained, tmp_path):
    jobs = [job("resnet50/full", "a"), job("resnet50/dcl", "b")]
    tracking = place.driver()
    place.show(tracking, *(JobProgress(one, trained(one), "finished") for one in jobs))
    assert tracking.flush(60) == []
    choices = tracking.registry.members([one.name for one in jobs])
    submission = tmp_path / "submission.csv"
    submission.write_text("id,predicted\n1,7\n")
    result = {
        "members": {one.name: {"top1_error": 0.25, "version": choices[one.name].version} for one in jobs},
        "top1_error": 0.125, "split": "test", "submission": str(submission), "probabilities": "",
    }  # fmt: skip
    client = MlflowClient(place.uri)
    for _ in range(2):
        tracking = place.driver()
        place.show(tracking, ensemble=EnsembleResult("e" * 64, choices, result))
        assert tracking.flush(60) == []
        run = client.get_run(run_of(client, "ensemble").info.run_id)
        assert run.data.tags["member.resnet50/dcl"] == str(choices["resnet50/dcl"].version)
        assert run.data.tags["sha256.resnet50/dcl"] == choices["resnet50/dcl"].sha256
        assert run.data.tags["mlflow.parentRunId"] == run_of(client, "plan").info.run_id
        assert run.data.metrics == {
            "top1_error": 0.125,
            "top1_error/resnet50/full": 0.25,
            "top1_error/resnet50/dcl": 0.25,
        }
        assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"members.json", "submission.csv"}
        assert {model.model_id for model in run.inputs.model_inputs} == {choice.model_id for choice in choices.values()}


def test_an_ensemble_of_choices_made_while_mlflow_was_away_names_the_versions_of_now(place, job, trained):
    full, tracking = job(), place.driver()
    folder = trained(full)
    sha256 = commit.digests(folder / "weights")["model.safetensors"]
    away = Choice("shop.resnet50.full", None, full.key, sha256, 1, "")
    result = {"members": {full.name: {}}, "top1_error": None, "split": None, "submission": None, "probabilities": ""}
    ensemble = EnsembleResult("e" * 64, {full.name: away}, result)
    place.show(tracking, JobProgress(full, folder, "finished"), ensemble=ensemble)
    assert tracking.flush(60) == []
    tags = run_of(MlflowClient(place.uri), "ensemble").data.tags
    chosen = tracking.registry.members([full.name])[full.name]
    assert tags["member.resnet50/full"] == str(chosen.version)
    assert tags["model.resnet50/full"] == chosen.model_id
    assert tags["aliprod.result"] == "e" * 64


def test_a_port_where_nothing_listens_is_told_at_once_and_without_the_password():
    began = time.monotonic()
    with pytest.raises(
        Unreachable, match=r"http://127\.0\.0\.1:9: MLflow does not answer: the connection is refused"
    ) as told:
        Tracking("http://ann:hunter2@127.0.0.1:9", "shop", None)
    assert told.value.status == 3
    assert "hunter2" not in str(told.value)
    assert time.monotonic() - began < 5


def test_a_folder_is_refused_as_an_address_of_mlflow(tmp_path):
    with pytest.raises(Refused, match="no longer keeps runs in a folder"):
        Tracking(str(tmp_path / "mlruns"), "shop", None)


def test_a_database_of_another_release_is_told_how_to_upgrade(place):
    with sqlite3.connect(place.storage / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '90e64c465722'")
    database.close()
    with pytest.raises(Unreachable, match="mlflow db upgrade sqlite:///") as told:
        place.driver()
    assert told.value.status == 3


def test_a_driver_killed_while_it_makes_the_database_leaves_none_that_is_half_made(tmp_path):
    program = "import sys; from aliprod.tracking.server import reach; reach(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", program, f"sqlite:///{tmp_path}/mlflow.db"]) as process:
        while not [path for path in tmp_path.glob(".mlflow.db.*/mlflow.db") if path.stat().st_size > 200_000]:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
    assert not (tmp_path / "mlflow.db").exists()


def test_a_file_that_is_no_database_is_told_in_a_sentence(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(Unreachable, match="file is not a database"):
        Tracking(f"sqlite:///{tmp_path}/mlflow.db", "shop", tmp_path)


def test_a_locked_database_is_told_in_seconds_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "_LOCK_SECONDS", 0.5)
    database = tmp_path / "mlflow.db"
    server.reach(f"sqlite:///{database}")
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        begin = time.monotonic()
        with pytest.raises(Unreachable, match="another process keeps this SQLite locked") as told:
            server.reach(f"sqlite:///{database}")
        assert time.monotonic() - begin < 10
    assert f"`fuser {database}` names the process" in told.value.advice


def test_an_experiment_that_a_person_deleted_is_restored(place):
    client = MlflowClient(place.uri)
    assert place.driver().flush(60) == []
    client.delete_experiment(client.get_experiment_by_name("shop").experiment_id)
    assert place.driver().flush(60) == []
    assert client.get_experiment_by_name("shop").lifecycle_stage == "active"


def test_connecting_leaves_the_environments_address_alone(place):
    place.driver()
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:9"
