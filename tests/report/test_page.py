"""The report: one file that needs nothing else, runs no script, and tells what the storage path holds."""

import base64
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.sources import read
from aliprod.ensemble.add import write_ensemble
from aliprod.inference import probabilities
from aliprod.plan.load import load
from aliprod.plan.open import Request, open_plan
from aliprod.plan.places import resolve
from aliprod.report import page
from aliprod.store import commit

PLAN = """\
format = 1
name = "shop"
catalogue = { path = "pictures" }
backbones = { net = "resnet18.a1_in1k" }
stages = { full = { epochs = 2 }, accuracy = { start = "full", epochs = 2 } }
jobs = { net = ["full", "accuracy"] }
ensemble = { members = ["net/full", "net/accuracy"] }
cluster = { tracking_uri = "https://me:secret@tracking" }
"""
HOSTILE = "<script>alert(1)</script>"


class Seen(HTMLParser):
    """The tags of a page with their attributes, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture
def request_of(packages: Catalogue, tmp_path: Path) -> Request:
    """A plan over a catalogue whose first class has a hostile name."""
    pictures = tmp_path / "pictures"
    shutil.copytree(packages.root, pictures)
    tree = pictures / "product_tree.json"
    tree.write_text(tree.read_text().replace(json.dumps(packages.names[0])[1:-1], HOSTILE))
    (tmp_path / "plan.toml").write_text(PLAN)
    plan = load(tmp_path / "plan.toml")
    return Request(plan, PLAN, resolve(plan, tmp_path / "runs", None, None))


def seen(request: Request) -> Seen:
    path = page.write(request)
    assert path == request.places.storage / "shop" / "report.html"
    return Seen(path.read_text(encoding="utf-8"))


def ended(request: Request) -> None:
    """As a run leaves it: every image is taken for class 1, but one of class 0, which is known."""
    catalogue = read(request.places.storage.parent / "pictures")
    assert HOSTILE in catalogue.names[0]
    assert catalogue.test_labels is not None
    guess = np.ones(len(catalogue.test), np.int64)
    guess[np.flatnonzero(catalogue.test_labels == 0)[0]] = 0
    rows = np.eye(catalogue.num_classes, dtype=np.float32)[guess]
    folder = request.places.storage / "shop"
    probabilities.write(
        folder / "m", catalogue.test.ids, catalogue.classes, lambda missing: [torch.from_numpy(rows[missing])]
    )
    write_ensemble(folder / "ensemble", [probabilities.open_store(folder / "m")], record={"split": "test"})
    opened = open_plan(request)
    jobs = opened.jobs
    for number, job in enumerate(jobs.values()):
        kept = opened.job_folder(job.name)
        lines = [
            {"epoch": epoch, "time_ms": 1000 * epoch, "val/top1_error": 0.75 - 0.25 * epoch - 0.125 * number}
            for epoch in range(2)
        ]
        commit.write_file(kept / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        commit.write(kept / "weights", lambda new: (new / "model").touch(), {"top1_error": 0.5 - 0.125 * number})
    ensemble = {
        "members": {name: {"top1_error": 0.5, "version": 1} for name in jobs},
        "top1_error": 0.1234,
        "split": "test",
        "submission": None,
        "probabilities": str(folder / "ensemble"),
    }
    commit.write_file(folder / "result.json", json.dumps({"ensemble": ensemble}))
    choice = {"name": "shop.net.full", "version": 3, "key": "ab" * 32, "sha256": "cd" * 32, "epoch": 1, "source": ""}
    commit.write_file(folder / "members.json", json.dumps({"net/full": choice}))


def test_a_plan_that_has_not_run_has_a_report_of_its_jobs(request_of: Request) -> None:
    found = seen(request_of)
    assert "There is no ensemble yet." in found.words
    assert "net/accuracy" in found.words
    assert not [attributes for tag, attributes in found.tags if tag == "img"]


def test_jobs_that_did_not_end_well_say_why_and_the_others_how_long_they_took(request_of: Request) -> None:
    states = {"net/full": "failed", "net/accuracy": "not_run"}
    reasons = {"net/full": "the loss is <not finite>", "net/accuracy": "net/full failed"}
    task = {"name": "net/full", "kind": "training", "job": "net/full", "nodes": ["a"], "since": 100.0, "until": 165.0}
    said = {"host": "gone", "pid": 1, "states": states, "reasons": reasons, "tasks": [task], "nodes": []}
    said["page"] = "http://mlflow:5000/#/experiments/1/runs?a=b after `mlflow ui`"
    commit.write_file(request_of.places.storage / "shop" / "state.json", json.dumps(said))
    found = seen(request_of)
    links = [attributes["href"] for tag, attributes in found.tags if tag == "a"]
    assert links[0] == "http://mlflow:5000/#/experiments/1/runs?a=b"
    assert links[1] == f"{links[0]}&compareRunsMode=CHART"
    words = found.words
    for told in ("failed: the loss is <not finite>", "not run: net/full failed", "1 min 05 s"):
        assert told in words


def test_a_finished_plan_tells_its_errors_gains_and_confusions_with_pictures(request_of: Request) -> None:
    ended(request_of)
    found = seen(request_of)
    for told in ("12.34%", "50.00%", "37.50%", "-12.50", "Errors by epoch", "Errors by class size"):
        assert told in found.words
    catalogue = read(request_of.places.storage.parent / "pictures")
    labels = catalogue.test_labels
    assert labels is not None
    for label in (0, 2, 3):
        wrong = np.count_nonzero(labels == label) - (label == 0)
        assert f"{wrong} of {np.count_nonzero(labels == label)}: {catalogue.names[label]} taken for" in found.words
    pictures = [attributes["src"] or "" for tag, attributes in found.tags if tag == "img"]
    for picture in pictures:
        whole = base64.b64decode(picture.removeprefix("data:image/jpeg;base64,"), validate=True)
        assert 0 < max(Image.open(io.BytesIO(whole)).size) <= 120
    shown = 3 * 3 + min(12, len(labels) - 1 - np.count_nonzero(labels == 1))  # the wrong one, both classes; mistakes
    assert len(pictures) == shown
    assert "misjudged: " in found.words
    assert "100% sure" in found.words


def test_the_leaderboard_is_sorted_and_begins_with_the_gain_on_the_best_member(request_of: Request) -> None:
    ended(request_of)
    folder = request_of.places.storage / "shop"
    result = json.loads((folder / "result.json").read_text())
    told = {"top1_error": 0.25, "interval": [0.2, 0.3], "gain": 0.1, "gain_interval": [-0.01, 0.2]}
    members = {
        "net/full": told | {"top1_error": 0.5, "weight": 1, "temperature": None, "left_out": None},
        "net/accuracy": told | {"weight": 3, "temperature": 1.5, "left_out": told | {"gain": 0.0375}},
    }
    comparison = {
        "split": "val", "views": "ten_crop", "combine": "greedy", "images": 1234, "ensemble": told, "sum": told,
        "best": {"member": "net/accuracy", "split": "val", "views": "ten_crop"}, "members": members,
        "smallest": told | {"members": ["net/accuracy"], "standard_error": 0.01},
        "floors": {"net/probe": told | {"top1_error": 0.6}},
    }  # fmt: skip
    result["ensemble"]["comparison"] = comparison
    commit.write_file(folder / "result.json", json.dumps(result))
    words = " ".join(seen(request_of).words.split())
    assert words.index("best member, net/accuracy by val, ten crops") < words.index("Ensemble and members, on val, ten")
    board = words[words.index("what leaving it out costs") :]
    assert board.index("25.00% (20.00 to 30.00)") < board.index("net/accuracy") < board.index("net/full")
    assert "+3.75 points (-1.00 to +20.00) 3 1.50" in board
    assert board.index("net/full") < board.index("floor: net/probe 60.00% (20.00 to 30.00) +10.00 points")
    assert "each image by what was fitted without it" in words
    for told in ("top-1 error on val, ten crops", "on val, centre crop", "Hollow: on val, centre crop, the best epoch"):
        assert told in words


def test_names_are_text_nothing_is_loaded_and_no_password_is_told(request_of: Request) -> None:
    ended(request_of)
    found = seen(request_of)
    assert HOSTILE in found.words
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in found.tags)
    addresses = [value or "" for _, found in found.tags for name, value in found.items() if name in ("src", "href")]
    assert all(value.startswith(("data:", "https://tracking/#/models/")) for value in addresses)
    policy = [attributes["content"] for tag, attributes in found.tags if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert "secret" not in page.write(request_of).read_text(encoding="utf-8")


def test_an_ensemble_without_labels_has_a_report_without_errors(request_of: Request) -> None:
    ended(request_of)
    file = request_of.places.storage / "shop" / "result.json"
    said = json.loads(file.read_text())
    commit.write_file(file, json.dumps({"ensemble": said["ensemble"] | {"top1_error": None, "split": None}}))
    words = seen(request_of).words
    assert "no labels to score it on" in words
    assert "The surest mistakes" not in words


def test_each_member_is_known_by_version_key_and_checksum(request_of: Request) -> None:
    ended(request_of)
    found = seen(request_of)
    assert ("a", {"href": "https://tracking/#/models/shop.net.full/versions/3"}) in found.tags
    for told in ("3 of shop.net.full", "abababababababab", "cdcdcdcdcdcdcdcd", request_of.plan.digest, "aliprod 0."):
        assert told in found.words


def test_ranks_hours_states_and_times_stand_in_the_plan(request_of: Request) -> None:
    task = {
        "name": "net/full",
        "kind": "training",
        "job": "net/full",
        "nodes": ["a"] * 4,
        "since": 100.0,
        "until": 1000.0,
    }
    said = {"host": "gone", "pid": 1, "states": {"net/full": "failed"}, "reasons": {"net/full": "no"}, "nodes": []}
    commit.write_file(
        request_of.places.storage / "shop" / "state.json",
        json.dumps(said | {"tasks": [task | {"gpus": 1}], "past": [task | {"gpus": 1, "since": 0.0, "until": 100.0}]}),
    )
    words = " ".join(seen(request_of).words.split())
    assert "1.11GPU-hours" in words
    assert "failed, 16 min 40 s" in words
    assert "As of 1970-01-01 00:16 UTC" in words


def test_the_same_results_are_the_same_bytes(request_of: Request) -> None:
    ended(request_of)
    assert page.write(request_of).read_bytes() == page.write(request_of).read_bytes()


@pytest.mark.parametrize("lost", ["runs/shop/ensemble", "pictures"])
def test_what_was_removed_by_hand_leaves_the_rest_of_the_report(request_of: Request, lost: str) -> None:
    ended(request_of)
    shutil.rmtree(request_of.places.storage.parent / lost)
    found = seen(request_of)
    assert "12.34%" in found.words
    assert "What is taken for what" not in found.words


def test_a_report_on_50_030_classes_stays_below_5_mb_and_reads_no_more_than_it_shows(tmp_path: Path) -> None:
    """Each picture is a file of noise, which no JPEG makes small; every class is confused with another."""
    classes = 50_030
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    (tmp_path / "photos" / "all").mkdir(parents=True)
    Image.fromarray(noise).save(tmp_path / "photos" / "all" / "noise.jpg")
    for split, images in (("train", 1), ("test", 1)):
        names = [f"all/{split}-{row}.jpg" for row in range(images * classes)]
        for name in names:
            (tmp_path / "photos" / name).symlink_to("noise.jpg")
        lines = (f"{name},product {row % classes:05}" for row, name in enumerate(names))
        (tmp_path / "photos" / f"{split}.csv").write_text("path,class\n" + "\n".join(lines))
    (tmp_path / "plan.toml").write_text(PLAN.replace("pictures", "photos"))
    plan = load(tmp_path / "plan.toml")
    request = Request(plan, PLAN, resolve(plan, tmp_path / "runs", None, None))
    catalogue = read(tmp_path / "photos")
    assert catalogue.num_classes == classes
    folder = request.places.storage / "shop"
    top = (np.arange(classes)[:, None] + np.arange(1, 6)) % classes

    def fill(staging: Path) -> None:
        columns = {"class_id": top[:, 0], "top_classes": list(top), "shares": [[0.5, 0.2, 0.1, 0.1, 0.1]] * classes}
        pq.write_table(pa.table({"image_id": catalogue.test.ids, **columns}), staging / "predictions.parquet")

    commit.write(folder / "ensemble", fill, {"split": "test"})
    ensemble = {"members": {}, "top1_error": 1.0, "split": "test", "submission": None, "probabilities": ""}
    commit.write_file(folder / "result.json", json.dumps({"ensemble": ensemble}))
    words = seen(request).words
    assert "1 of 1: product 00000 taken for product 00001" in words
    assert "too many to be hashed" in words
    assert (folder / "report.html").stat().st_size < 5e6
