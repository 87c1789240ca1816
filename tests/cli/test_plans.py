"""Plans: answers for programs, and a sentence, never a traceback, for wrong input."""

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
from shop import Shop, aliprod, answer, refusal


def test_plan_tells_each_job_and_what_is_done(shop: Shop) -> None:
    shop.finish("net/full")
    told = answer("plan", shop.plan)
    assert set(told) == {"plan", "jobs", "members", "missing", "takes", "estimate"}
    weights = next(shop.storage.glob("jobs/net/full/*/weights/model.safetensors")).stat().st_size
    assert told["takes"]["bytes"] == pytest.approx(2 * weights, rel=0.02), "net/accuracy's, and MLflow's copy"
    assert told["takes"]["gpu_hours"] is None, "no rate is known"
    assert (told["plan"], told["members"]) == ("shop", ["net/accuracy"])
    assert told["missing"] == {"comparison": 1, "ensemble": 1, "prediction": 1, "training": 1}
    jobs = {job.pop("name"): job for job in told["jobs"]}
    keys = {job.pop("key") for job in jobs.values()}
    assert all(len(key) == 64 for key in keys)
    assert jobs == {
        "net/full": {
            "backbone": "net",
            "stage": "full",
            "parents": [],
            "state": "finished",
            "member": False,
            "because": [],
            "bytes": 0.0,
            "gpu_hours": 0.0,
        },
        "net/accuracy": {
            "backbone": "net",
            "stage": "accuracy",
            "parents": ["net/full"],
            "state": "waiting",
            "member": True,
            "because": ["new"],
            "bytes": pytest.approx(told["takes"]["bytes"], rel=0.01),
            "gpu_hours": None,
        },
    }


def test_plan_says_why_each_job_would_run(shop: Shop) -> None:
    shop.finish("net/full")
    shop.finish("net/accuracy")

    def because(*sets: str) -> dict[str, list[str]]:
        flags = [word for text in sets for word in ("--set", text)]
        return {job["name"]: job["because"] for job in answer("plan", shop.plan, *flags)["jobs"]}

    assert because() == {"net/full": [], "net/accuracy": []}
    said = because("stages.full.epochs=3", "stages.full.lr.heads=0.5")
    assert said["net/full"] == ["stages.full.epochs 1 -> 3", "stages.full.lr.heads 0.1 -> 0.5"]
    assert said["net/accuracy"] == ["net/full is trained anew"]
    for epochs, says in ((20, "from epoch 13"), (12, "with the scoring of its last epoch")):  # 18 images are a batch
        other = f"stages.full.epochs={epochs}"
        key = next(job["key"] for job in answer("plan", shop.plan, "--set", other)["jobs"])
        (shop.storage / "jobs" / "net" / "full" / key / "resume" / "step-00000012").mkdir(parents=True)
        assert because(other)["net/full"] == [f"goes on {says}, step 12"]
        assert f"net/full: goes on {says}, step 12" in aliprod("plan", shop.plan, "--set", other).stdout


def test_plan_for_people_says_which_jobs_run_or_have_failed(shop: Shop) -> None:
    said = {"states": {"net/full": "failed", "net/accuracy": "not_run"}, "reasons": {}, "tasks": [], "nodes": []}
    (shop.storage / "shop").mkdir(parents=True)
    (shop.storage / "shop" / "state.json").write_text(json.dumps({"host": "another", "pid": 1, **said}))
    full, accuracy = aliprod("plan", shop.plan).stdout.splitlines()[2:4]
    assert "  failed  " in full
    assert "  not run  yes  " in accuracy
    assert [job["state"] for job in answer("plan", shop.plan)["jobs"]] == ["waiting", "waiting"]


def test_plan_for_people_counts_what_is_to_be_trained(shop: Shop) -> None:
    shop.finish("net/full")
    text = aliprod("plan", shop.plan).stdout
    assert "2 jobs, 1 to train, 1 members. To make: comparison 1, ensemble 1, prediction 1, training 1." in text
    assert "{" not in text


def test_plan_without_a_catalogue_tells_all_but_the_keys(shop: Shop) -> None:
    (shop.folder / "photos").unlink()
    assert [job["key"] for job in answer("plan", shop.plan)["jobs"]] == [None, None]
    result = aliprod("plan", shop.plan)
    assert f"There is no catalogue at {shop.folder / 'photos'}" in result.stderr


def test_plan_and_status_write_nothing(shop: Shop) -> None:
    answer("plan", shop.plan)
    answer("status", shop.plan)
    assert not shop.storage.exists()


def test_a_changed_setting_changes_its_jobs_key_and_those_below(shop: Shop) -> None:
    before = {job["name"]: job["key"] for job in answer("plan", shop.plan)["jobs"]}
    after = {job["name"]: job["key"] for job in answer("plan", shop.plan, "--set", "stages.accuracy.seed=1")["jobs"]}
    assert after["net/full"] == before["net/full"]
    assert after["net/accuracy"] != before["net/accuracy"]


def test_status_tells_the_state_of_each_job(shop: Shop) -> None:
    shop.finish("net/full")
    told = answer("status", shop.plan)
    full, accuracy = told["jobs"]
    columns = {
        "name",
        "key",
        "state",
        "reason",
        "world_size",
        "epoch",
        "epochs",
        "top1_error",
        "kind",
        "images_per_second",
        "floor",
    }
    assert (set(told), set(full)) == ({"plan", "jobs", "tasks", "eta_seconds"}, columns | {"eta_seconds", "gain"})
    assert (told["tasks"], told["eta_seconds"]) == ([], None), "nothing runs"
    assert (full["reason"], accuracy["reason"]) == (None, None), "nothing is missing but a run"
    assert (full["state"], full["top1_error"], accuracy["state"]) == ("finished", 0.25, "waiting")
    assert "25.00" in aliprod("status", shop.plan).stdout


def test_status_shows_what_a_finished_job_gained_on_its_parent_in_points(shop: Shop) -> None:
    assert [job["gain"] for job in answer("status", shop.plan)["jobs"]] == [None, None]
    shop.finish("net/full")
    shop.finish("net/accuracy", 0.125)
    assert [job["gain"] for job in answer("status", shop.plan)["jobs"]] == [None, -0.125]
    *_, full, accuracy = aliprod("status", shop.plan).stdout.splitlines()
    assert "-12.50" in accuracy
    assert "-" not in full


def test_a_typo_in_a_plan_is_answered_with_line_and_nearest_name(shop: Shop) -> None:
    shop.write("epochs = 1", "epohcs = 1")
    for command in ("plan", "run", "status", "ensemble"):
        said = refusal(2, command, shop.plan)
        assert f"{shop.plan}, line 15" in said
        assert "Did you mean epochs?" in said
    assert not shop.storage.exists()


def test_a_typo_in_a_flag_is_answered_with_the_flag(shop: Shop) -> None:
    said = refusal(2, "plan", shop.plan, "--set", "stages.full.epohcs=2")
    assert "--set stages.full.epohcs=2" in said
    assert "Did you mean epochs?" in said
    refusal(2, "plan", shop.plan, "--set", "stages")


def test_stages_that_start_from_each_other_are_refused(shop: Shop) -> None:
    shop.write("[stages.full]\nepochs = 1", '[stages.full]\nstart = "accuracy"')
    said = refusal(2, "run", shop.plan)
    assert "full" in said
    assert "accuracy" in said


def test_a_backbone_that_timm_does_not_know_is_answered_with_the_nearest_name(shop: Shop) -> None:
    shop.write("test_resnet.r160_in1k", "resnet5o")
    for command in ("plan", "run"):
        said = refusal(2, command, shop.plan)
        assert "backbones.net" in said
        assert "Did you mean resnet50?" in said
    assert shop.files() == {}


def test_test_images_that_are_trained_on_and_scored_are_refused(shop: Shop) -> None:
    labelled = 'objective = "accuracy"\npseudo_labels = { by = ["net/full"] }'
    shop.write('objective = "accuracy"', labelled)
    assert aliprod("plan", shop.plan).exit_code == 0
    said = refusal(2, "run", shop.plan)
    assert "plan shop, net/accuracy: trains on test images, by their pseudo labels" in said
    assert 'Say score = "val" in [ensemble].' in said
    assert shop.files() == {}
    said = refusal(2, "run", shop.plan, "--set", "ensemble.score=val", "--set", "backbones.net=resnet5o")
    assert "pseudo labels" not in said, "what is scored on val may learn from test"
    assert "Did you mean resnet50?" in said


def test_pseudo_labels_of_a_catalogue_without_test_images_are_refused(shop: Shop, photos: Path) -> None:
    (shop.folder / "photos").unlink()
    shutil.copytree(photos, shop.folder / "photos")
    for name in ("test.json", "test_labels.json"):
        (shop.folder / "photos" / name).unlink()
    said = refusal(2, "run", shop.plan, "--set", 'stages.accuracy.pseudo_labels.by=["net/full"]')
    assert "net/accuracy: takes pseudo labels of test images, of which there are none" in said
    assert shop.files() == {}


def test_pretrained_weights_that_are_not_there_are_named(shop: Shop) -> None:
    shop.write("epochs = 1", 'pretrained = "none.safetensors"')
    for command in ("plan", "run"):
        assert "none.safetensors" in refusal(2, command, shop.plan)


@pytest.mark.parametrize("command", ["plan", "run", "status", "ensemble"])
def test_a_path_that_is_no_catalogue_is_refused(shop: Shop, command: str) -> None:
    (shop.folder / "photos").unlink()
    (shop.folder / "photos").mkdir()
    (shop.folder / "photos" / "holiday.txt").write_text("we had fun")
    said = refusal(2, command, shop.plan)
    assert f"{shop.folder / 'photos'}: holds no catalogue" in said
    assert "train.json" in said
    assert shop.files() == {}


@pytest.mark.parametrize("command", ["run", "ensemble"])
def test_a_run_without_a_catalogue_is_refused(shop: Shop, command: str) -> None:
    (shop.folder / "photos").unlink()
    assert f"{shop.folder / 'photos'}: is not there" in refusal(2, command, shop.plan)
    assert shop.files() == {}


def test_a_catalogue_with_nothing_to_predict_is_refused(shop: Shop, photos: Path) -> None:
    (shop.folder / "photos").unlink()
    shutil.copytree(photos, shop.folder / "photos")
    for name in ("val.json", "test.json", "test_labels.json"):
        (shop.folder / "photos" / name).unlink(missing_ok=True)
    said = refusal(2, "run", shop.plan)
    assert "neither val nor test images" in said
    assert str(shop.folder / "photos") in said


ANNOTATIONS = {
    "cut_off": "line 3",
    "empty": "is empty",
    "not_json": "is not JSON",
    "list": "no key images",
    "no_images_key": "no key images",
    "images_null": "null",
    "images_empty": "no row that can be trained on",
    "rows_are_lists": "no row that can be trained on",
    "latin1": "is not UTF-8",
    "images_key_twice": "the key images twice",
}


def annotated(shop: Shop, shared: Path, name: str) -> None:
    """Let the catalogue have one of the broken annotation files."""
    (shop.folder / "photos").unlink()
    shutil.copytree(
        shared / "data" / "broken" / "train", shop.folder / "photos" / "train", copy_function=shutil.copyfile
    )
    shutil.copyfile(shared / "data" / "broken" / "annotations" / f"{name}.json", shop.folder / "photos" / "train.json")


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_an_annotation_file_that_is_wrong_is_named_with_its_fault(shop: Shop, shared: Path, name: str) -> None:
    annotated(shop, shared, name)
    for command in ("plan", "run"):
        said = refusal(2, command, shop.plan)
        assert str(shop.folder / "photos" / "train.json") in said
        assert ANNOTATIONS[name] in said
    assert shop.files() == {}


def test_every_broken_annotation_file_is_among_those_tried(shared: Path) -> None:
    assert {path.stem for path in (shared / "data" / "broken" / "annotations").iterdir()} == {*ANNOTATIONS, "bom"}


def test_an_annotation_file_with_a_byte_order_mark_is_read(shop: Shop, shared: Path) -> None:
    annotated(shop, shared, "bom")
    assert all(job["key"] for job in answer("plan", shop.plan)["jobs"])


def test_an_mlflow_that_is_not_there_stops_a_run_before_it_begins(shop: Shop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
    shop.finish("net/full")
    before = shop.files()
    began = time.monotonic()
    said = refusal(3, "run", shop.plan, "--tracking-uri", uri)
    assert time.monotonic() - began < 60  # not the minutes that a client waits by itself
    assert uri in said
    assert "the connection is refused" in said
    assert "--tracking-uri" in said
    assert shop.files() == before


def test_an_address_without_a_ray_stops_a_run(shop: Shop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    began = time.monotonic()
    said = refusal(3, "run", shop.plan, "--address", address)
    assert time.monotonic() - began < 120  # Ray itself would go on for minutes
    assert f"{address}: no Ray cluster answers" in said
    assert "--address" in said


def test_a_storage_path_that_cannot_be_written_stops_a_run(shop: Shop) -> None:
    (shop.folder / "file").write_text("not a folder")
    said = refusal(3, "run", shop.plan, "--storage", shop.folder / "file" / "runs")
    assert str(shop.folder / "file" / "runs") in said
    assert "--storage" in said
    assert (shop.folder / "file").read_text() == "not a folder"


def test_an_ensemble_of_what_is_not_trained_is_told_to_run_first(shop: Shop) -> None:
    shop.finish("net/full")
    before = shop.files()
    said = refusal(1, "ensemble", shop.plan)
    assert "not trained yet: net/accuracy" in said
    assert "Run the plan first." in said
    assert shop.files() == before
