"""What is done with results: scores, predictions."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from shop import Shop, aliprod, answer, refusal

from aliprod.ensemble.add import submission
from aliprod.models import weights
from aliprod.store import commit


def test_evaluate_tells_both_errors(shop: Shop) -> None:
    labels = shop.folder / "photos" / "test_labels.json"
    rows = json.loads(labels.read_text())["images"]
    ids = [row["image_id"] for row in rows]
    (shop.folder / "right.csv").write_text(submission(ids, [int(row["class_id"]) for row in rows]))
    told = answer("evaluate", shop.folder / "right.csv", labels)
    classes = len({row["class_id"] for row in rows})
    assert told == {"top1_error": 0.0, "top1_error_per_image": 0.0, "images": len(ids), "classes": classes}
    assert "0.00%" in aliprod("evaluate", shop.folder / "right.csv", labels).stdout


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


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("none", "is no weights folder"),
        ("photos", "is no weights folder"),
        ("plan.toml", "has no ensemble in this storage path yet"),
        ("models:/nothing", "is no address of a model"),
        ("none.toml", "none.toml"),
        ("phots", "Did you mean photos?"),
    ],
)
def test_a_model_that_is_none_is_refused(shop: Shop, model: str, what: str) -> None:
    assert what in refusal(2, "predict", model, shop.folder / "photos" / "test")


def test_answers_are_not_written_over_the_table_that_is_asked_about(weights_folder: Path, photos: Path) -> None:
    table = photos.parent / "asked.csv"
    table.write_text("path,mine\n")
    said = refusal(2, "predict", weights_folder, table, "--out", table)
    assert "it would be written over" in said
    assert table.read_text() == "path,mine\n"


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


def test_a_folder_without_pictures_is_refused(weights_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = refusal(2, "predict", weights_folder, tmp_path / "empty")
    assert f"{tmp_path / 'empty'}: holds no picture." in said


def test_a_plans_ensemble_is_exported_with_its_weight_temperature_and_error(shop: Shop) -> None:
    shop.finish("net/accuracy")
    [folder] = (shop.storage / "jobs" / "net" / "accuracy").glob("*/weights")
    choice = {"key": folder.parent.name, "sha256": commit.digests(folder)[weights.MODEL]}
    own = shop.storage / "shop"
    record = {"members": [{"job": "net/accuracy", "weight": 2, "temperature": 1.25}]}
    commit.write(own / "ensemble", lambda new: None, record)
    (own / "members.json").write_text(json.dumps({"net/accuracy": choice}))
    (own / "comparison").mkdir()
    error = {"top1_error": 0.125, "interval": [0.05, 0.25]}
    told = {"split": "test", "views": "ten_crop", "images": 1234, "ensemble": error}
    (own / "comparison" / "comparison.json").write_text(json.dumps(told))
    test = shop.folder / "photos" / "test"
    found = answer("export", shop.plan, "out", "--to", "torch", "--views", "ten", "--images", test)
    assert set(found) >= {"path", "format", "bytes", "images", "largest_difference"}
    assert found["bytes"] == sum(file.stat().st_size for file in (shop.folder / "out").iterdir())
    assert (found["images"], found["compared"]) == (len(list(test.iterdir())), "pictures")
    assert 0 <= found["largest_difference"] <= 1e-4
    [member] = found["members"]
    assert (member["weight"], member["temperature"], member["sha256"]) == (2, 1.25, choice["sha256"])
    assert "12.50% (5.00% to 25.00%) on test, ten crops, 1,234 images" in (shop.folder / "out/README.md").read_text()
    assert commit.verify(shop.folder / "out") == []


def test_an_export_of_what_is_no_model_is_refused(shop: Shop) -> None:
    assert "is no weights folder" in refusal(2, "export", "photos", "out")
    assert "has no ensemble in this storage path yet" in refusal(2, "export", "plan.toml", "out")
    assert not (shop.folder / "out").exists()


def test_an_export_compared_on_no_picture_is_refused(weights_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none"):
        said = refusal(2, "export", weights_folder, tmp_path / "out", "--to", "torch", "--images", folder)
        assert f"{folder}: holds no picture." in said
    assert not (tmp_path / "out").exists()


def test_predict_shows_an_odd_name_in_one_line_and_json_has_the_name_itself(weights_folder: Path) -> None:
    odd = weights_folder.parent / "12:30@a\x1b[2J\nb.png: a cat\u202e\x9b.png"
    odd.write_bytes(b"no picture")
    result = aliprod("predict", weights_folder, odd)
    shown = str(odd).translate({ord(one): f"\\u{ord(one):04x}" for one in "\x1b\n\u202e\x9b"})
    assert result.stdout == f"{shown}: is no JPEG, PNG, WebP, GIF, BMP or TIFF\n"
    [line] = aliprod("predict", weights_folder, odd, "--json").stdout.splitlines()
    assert line.isprintable()
    assert json.loads(line)["path"] == str(odd)


@pytest.mark.parametrize("network", ["hf-hub:timm/resnet18.a1_in1k", "hf_hub:a/b", "local-dir:/tmp"])
def test_a_network_of_a_weights_folder_is_never_fetched(
    weights_folder: Path, photos: Path, tmp_path: Path, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(weights_folder, folder)
    config = json.loads((folder / weights.CONFIG).read_text()) | {"network": network}
    (folder / weights.CONFIG).write_text(json.dumps(config))
    (folder / commit.MANIFEST).unlink(missing_ok=True)
    asked = list[object]()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **_: asked.append(where))
    monkeypatch.setattr(socket.socket, "connect", lambda _, where: asked.append(where))
    assert f'has no network "{network}"' in refusal(2, "predict", folder, photos / "test")
    assert asked == []
