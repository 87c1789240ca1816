"""The commands as a user types them: answers for programs, and a sentence, never a traceback, for wrong input."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

from aliprod.catalogue import sources
from aliprod.cli import app
from aliprod.ensemble.add import submission
from aliprod.models import weights
from aliprod.models.classifier import Classifier
from aliprod.plan import graph, ledger
from aliprod.plan.load import load
from aliprod.store import commit
from aliprod.synth.synth import synthesise

PLAN = """\
format = 1
name = "shop"

[catalogue]
path = "photos"

[backbones]
net = "test_resnet.r160_in1k"

[defaults]
resize = 40
crop = 32

[stages.full]
epochs = 1

[stages.accuracy]
start = "full"
objective = "accuracy"

[jobs]
net = ["full", "accuracy"]

[ensemble]
members = ["net/accuracy"]
"""


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "photos"
    synthesise(folder, classes=3, images=18, seed=0)
    return folder


@dataclass
class Shop:
    """A folder with a plan and its catalogue, in which the storage path is to be ``runs``."""

    folder: Path

    @property
    def plan(self) -> Path:
        return self.folder / "plan.toml"

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    def write(self, old: str = "", new: str = "") -> None:
        assert old in PLAN
        self.plan.write_text(PLAN.replace(old, new) if old else PLAN)

    def files(self) -> dict[str, bytes]:
        """All that lies in the storage path."""
        return {str(p.relative_to(self.storage)): p.read_bytes() for p in self.storage.rglob("*") if p.is_file()}

    def finish(self, name: str, error: float = 0.25) -> None:
        """Commit a job's weights, as its training would."""
        job = graph.jobs(load(self.plan), sources.read(self.folder / "photos").fingerprint)[name]
        folder = ledger.folder(self.storage, job) / "weights"
        commit.write(folder, model, {"top1_error": error, "best_epoch": 0, "seconds": 1.0})


def model(folder: Path, classes: int = 3) -> None:
    """A weights folder of a network that has learned nothing."""
    torch.manual_seed(0)
    network = Classifier("test_resnet.r160_in1k", classes)
    config = weights.Config(network.network, (0.5,) * 3, (0.25,) * 3, "bilinear", 40, 32)
    named = weights.Classes(tuple(range(10, 10 + classes)), tuple(f"name {number}" for number in range(classes)))
    weights.save(folder, network.state_dict(), config, named)


@pytest.fixture
def shop(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    for variable in ("ALIPROD_STORAGE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photos)
    found = Shop(tmp_path)
    found.write()
    return found


@pytest.fixture
def weights_folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    model(tmp_path / "weights")
    return tmp_path / "weights"


def aliprod(*arguments: str | Path) -> Result:
    """Run a command; whatever it is, it must not end in a traceback."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "Traceback" not in result.output
    return result


def answer(*arguments: str | Path, status: int = 0) -> dict[str, Any]:
    """The last line of standard output, which is JSON."""
    result = aliprod(*arguments, "--json")
    assert result.exit_code == status, result.output
    return dict(json.loads(result.stdout.splitlines()[-1]))


def refusal(status: int, *arguments: str | Path) -> str:
    """What a command says that does not do what it was asked for."""
    result = aliprod(*arguments)
    assert result.exit_code == status, result.output
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) <= 25, "one screen"
    return result.stderr


# Help


def commands(group: click.Group, name: str = "") -> Iterator[tuple[str, click.Command]]:
    for part, command in group.commands.items():
        full = f"{name} {part}".strip()
        if isinstance(command, click.Group):
            yield from commands(command, full)
        else:
            yield full, command


@pytest.mark.parametrize("name", [name for name, _ in commands(app)])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_of_a_command_shows_an_example(name: str, flag: str) -> None:
    result = aliprod(*name.split(), flag)
    assert result.exit_code == 0
    assert f"Example: aliprod {name} " in result.output


def test_help_names_every_command() -> None:
    for name, _ in commands(app):
        assert f"  {name.split()[-1]} " in aliprod(*name.split()[:-1], "--help").output


def test_a_misspelt_command_or_flag_is_named() -> None:
    assert "No such command 'rnu'" in aliprod("rnu").stderr
    assert "--storrage" in aliprod("plan", "plan.toml", "--storrage", "x").stderr
    assert aliprod("rnu").exit_code == aliprod("plan", "plan.toml", "--storrage", "x").exit_code == 2


# Answers


def test_plan_tells_each_job_and_what_is_done(shop: Shop) -> None:
    shop.finish("net/full")
    told = answer("plan", shop.plan)
    assert set(told) == {"plan", "jobs", "members", "estimate"}
    assert (told["plan"], told["members"]) == ("shop", ["net/accuracy"])
    jobs = {job.pop("name"): job for job in told["jobs"]}
    keys = {job.pop("key") for job in jobs.values()}
    assert all(len(key) == 64 for key in keys)
    assert jobs == {
        "net/full": {"backbone": "net", "stage": "full", "parents": [], "state": "finished", "member": False},
        "net/accuracy": {
            "backbone": "net",
            "stage": "accuracy",
            "parents": ["net/full"],
            "state": "waiting",
            "member": True,
        },
    }


def test_plan_for_people_counts_what_is_to_be_trained(shop: Shop) -> None:
    shop.finish("net/full")
    text = aliprod("plan", shop.plan).stdout
    assert "2 jobs, 1 to train, 1 members." in text
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
    columns = {"name", "key", "state", "epoch", "epochs", "top1_error", "images_per_second", "eta_seconds", "gain"}
    assert (set(told), set(full)) == ({"plan", "jobs"}, columns)
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


def test_evaluate_tells_both_errors(shop: Shop) -> None:
    labels = shop.folder / "photos" / "test_labels.json"
    rows = json.loads(labels.read_text())["images"]
    ids = [row["image_id"] for row in rows]
    (shop.folder / "right.csv").write_text(submission(ids, [int(row["class_id"]) for row in rows]))
    told = answer("evaluate", shop.folder / "right.csv", labels)
    classes = len({row["class_id"] for row in rows})
    assert told == {"top1_error": 0.0, "top1_error_per_image": 0.0, "images": len(ids), "classes": classes}
    assert "0.00%" in aliprod("evaluate", shop.folder / "right.csv", labels).stdout


@pytest.mark.parametrize("part", ["loader", "step", "train"])
def test_benchmark_tells_how_fast_and_what_limits(photos: Path, part: str) -> None:
    flags = ("--network", "test_resnet", "--crop", "32", "--batch-size", "4", "--steps", "2")
    found = answer("benchmark", part, photos, *flags)
    assert found["images_per_second"] > 0
    assert 0 <= found["data_wait_share"] <= 1
    assert found["limited_by"] in ("loader", "step")
    assert "images/s on cpu" in aliprod("benchmark", part, photos, *flags).output


def test_a_measured_plan_has_a_forecast_and_one_that_is_not_names_the_command(shop: Shop) -> None:
    flags = ("--set", "defaults.batch_size=4", "--set", "cluster.use_gpu=false")
    before = answer("plan", shop.plan, *flags, "--gpus", "2")["estimate"]
    assert (before["seconds"], before["missing"]) == (None, ["net/full", "net/accuracy", "net/accuracy test"])
    said = aliprod("plan", shop.plan, *flags, "--gpus", "2").stdout
    assert f"aliprod benchmark train {shop.plan} --set defaults.batch_size=4" in said
    measured = answer("benchmark", "train", shop.plan, *flags, "--steps", "1")["measured"]
    assert [(found["part"], found["jobs"]) for found in measured] == [
        ("train", ["net/full"]),
        ("train", ["net/accuracy"]),
        ("center", ["net/full", "net/accuracy"]),
        ("ten_crop", ["net/accuracy"]),
    ]
    found = answer("plan", shop.plan, *flags, "--gpus", "2")["estimate"]
    full, accuracy = found["jobs"]
    assert full["images_per_second"] == pytest.approx(measured[0]["images_per_second"])
    assert 0 == full["begin"] < full["end"] == accuracy["begin"] < accuracy["end"] < found["seconds"]
    assert found["lower_bound_seconds"] == pytest.approx(found["seconds"]), "a chain"
    assert "On 2 ranks: " in aliprod("plan", shop.plan, *flags, "--gpus", "2").stdout


def test_plan_without_gpus_estimates_nothing(shop: Shop) -> None:
    assert answer("plan", shop.plan)["estimate"] is None


def test_benchmark_refuses_flags_that_a_plan_says_itself_and_those_of_a_plan_for_a_catalogue(shop: Shop) -> None:
    assert "--batch-size" in refusal(2, "benchmark", "step", shop.plan, "--batch-size", "4")
    assert "--set" in refusal(2, "benchmark", "step", "photos", "--set", "seed=1")


def test_benchmark_names_the_network_that_is_meant(photos: Path) -> None:
    result = aliprod("benchmark", "step", photos, "--network", "resnet5")
    assert result.exit_code == 2
    assert "resnet50" in result.stderr


def test_data_synth_tells_what_it_rendered(tmp_path: Path) -> None:
    told = answer("data", "synth", tmp_path / "photos", "--classes", "2", "--images", "11", "--seed", "4")
    counts = {
        split: len(json.loads((tmp_path / "photos" / f"{split}.json").read_text())["images"])
        for split in ("train", "val", "test")
    }
    assert told == {"path": str(tmp_path / "photos"), "classes": 2, **counts}
    assert counts["train"] == 11


def test_data_check_lists_every_problem_and_succeeds(shared: Path) -> None:
    told = answer("data", "check", shared / "data" / "broken")
    assert set(told) == {"images", "readable", "problems", "classes"}
    assert 0 < told["readable"] < told["images"]
    assert {frozenset(problem) for problem in told["problems"]} == {frozenset({"path", "problem"})}
    assert "problems." in aliprod("data", "check", shared / "data" / "broken").stdout.splitlines()[-1]


def test_predict_answers_for_each_picture_and_names_what_is_none(weights_folder: Path, photos: Path) -> None:
    pictures = sorted((photos / "test").iterdir())[:2]
    (weights_folder.parent / "text.jpg").write_text("this is no picture")
    result = aliprod("predict", weights_folder, pictures[0], weights_folder.parent / "text.jpg", pictures[1], "--json")
    assert result.exit_code == 1
    first, text, second = map(json.loads, result.stdout.splitlines())
    assert set(text) == {"path", "error"}
    assert [first["path"], text["path"], second["path"]] == [
        str(pictures[0]),
        str(weights_folder.parent / "text.jpg"),
        str(pictures[1]),
    ]
    for told in (first, second):
        assert set(told) == {"path", "class_id", "name", "probability", "top"}
        assert {key: told[key] for key in ("class_id", "name", "probability")} == told["top"][0]
        assert sum(one["probability"] for one in told["top"]) == pytest.approx(1, abs=1e-5)
        assert told["name"] == f"name {told['class_id'] - 10}"
    assert aliprod("predict", weights_folder, photos / "test").exit_code == 0, "a folder of pictures alone"


def test_a_name_that_is_no_text_is_told_so_that_the_file_is_found_again(weights_folder: Path, photos: Path) -> None:
    folder = weights_folder.parent / "pictures"
    folder.mkdir()
    shutil.copyfile(min((photos / "test").iterdir()), os.fsencode(folder) + b"/\xff.jpg")
    command = [sys.executable, "-m", "aliprod", "predict", str(weights_folder), str(folder), "--json"]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, env=strict, capture_output=True, text=True, timeout=300)  # noqa: PLW1510
    assert done.returncode == 0, done.stderr
    assert os.fsencode(json.loads(done.stdout)["path"]) == os.fsencode(folder) + b"/\xff.jpg"


# Wrong input: nothing is started, nothing is written


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
    assert aliprod("plan", shop.plan).exit_code == 0, "it imports no timm"
    said = refusal(2, "run", shop.plan)
    assert "[backbones] net" in said
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


def test_data_check_of_what_is_no_catalogue_is_refused(tmp_path: Path) -> None:
    assert "holds no catalogue" in refusal(2, "data", "check", tmp_path)
    assert "is not there" in refusal(2, "data", "check", tmp_path / "none")


def test_data_synth_does_not_write_over_what_is_there(photos: Path) -> None:
    before = (photos / "train.json").read_bytes()
    assert str(photos) in refusal(2, "data", "synth", photos)
    assert (photos / "train.json").read_bytes() == before


def test_an_mlflow_that_is_not_there_stops_a_run_before_it_begins(shop: Shop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
    shop.finish("net/full")
    before = shop.files()
    began = time.monotonic()
    said = refusal(3, "run", shop.plan, "--tracking-uri", uri)
    assert time.monotonic() - began < 15
    assert uri in said
    assert "the connection is refused" in said
    assert "--tracking-uri" in said
    assert shop.files() == before


def test_an_address_without_a_ray_stops_a_run(shop: Shop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    began = time.monotonic()
    said = refusal(3, "run", shop.plan, "--address", address)
    assert time.monotonic() - began < 30
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


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("none", "is no weights folder"),
        ("photos", "is no weights folder"),
        ("plan.toml", "has no ensemble in this storage path yet"),
        ("models:/nothing", "is no address of a model"),
        ("none.toml", "none.toml"),
    ],
)
def test_a_model_that_is_none_is_refused(shop: Shop, model: str, what: str) -> None:
    assert what in refusal(2, "predict", model, shop.folder / "photos" / "test")


def test_pictures_that_are_not_there_are_named(weights_folder: Path, photos: Path) -> None:
    picture = min((photos / "test").iterdir())
    result = aliprod("predict", weights_folder, "none.jpg", picture, "--json")
    assert result.exit_code == 1
    missing, seen = map(json.loads, result.stdout.splitlines())
    assert (missing["path"], set(missing)) == ("none.jpg", {"path", "error"})
    assert "class_id" in seen


def test_damaged_weights_are_refused(weights_folder: Path, photos: Path) -> None:
    file = weights_folder / weights.MODEL
    file.write_bytes(file.read_bytes()[:1000])
    assert str(file) in refusal(2, "predict", weights_folder, photos / "test")


@pytest.mark.parametrize("broken", ["submission", "labels"])
def test_a_table_that_is_none_is_refused(shop: Shop, broken: str) -> None:
    (shop.folder / "submission.csv").write_text("id,predicted\na.jpg,1\n" if broken == "labels" else "nonsense\n")
    (shop.folder / "labels.csv").write_text("id,class_id\na.jpg,1\n" if broken == "submission" else "nonsense\n")
    assert f"{broken}.csv" in refusal(2, "evaluate", shop.folder / "submission.csv", shop.folder / "labels.csv")
