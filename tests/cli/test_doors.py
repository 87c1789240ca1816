"""What is wrong is answered at once: nothing heavy is loaded before the arguments are known to be good."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aliprod.synth.synth import synthesise

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ["torch", "torchvision", "timm", "ray", "mlflow"]
PROGRAM = """
import json, sys
from aliprod.cli import app
status = 0
try:
    app(json.loads(sys.argv[1]))
except SystemExit as ended:
    status = ended.code
print(json.dumps([status, [name for name in json.loads(sys.argv[2]) if name in sys.modules]]))
"""


def loaded(folder: Path, arguments: list[str], heavy: list[str]) -> tuple[int, list[str], str]:
    """Exit status, what of ``heavy`` was loaded, and what was said."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(arguments), json.dumps(heavy)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    status, names = json.loads(done.stdout.splitlines()[-1])
    return status, names, done.stderr


@pytest.mark.parametrize("command", ["plan", "run", "ensemble", "status", "report"])
def test_a_plan_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path: Path, command: str) -> None:
    status, names, said = loaded(tmp_path, [command, "typo.toml"], [*HEAVY, "numpy", "pyarrow", "PIL"])
    assert (status, names) == (2, [])
    assert "typo.toml: the plan cannot be read: No such file or directory." in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["predict", "nonsense", "photo.jpg"], "nonsense: is no weights folder: there is no such folder."),
        (["predict", "typo.toml", "photo.jpg"], "typo.toml: the plan cannot be read: No such file"),
        (["benchmark", "train", "typo.toml"], "typo.toml: the plan cannot be read: No such file"),
        (["tune", "typo.toml", "net/full"], "typo.toml: the plan cannot be read: No such file"),
        (["evaluate", "none.csv", "labels.csv"], "none.csv: there is no such file or folder."),
        (["trace", "none.csv"], "none.csv: cannot be read: No such file or directory."),
    ],
)
def test_a_file_that_is_not_there_is_named_before_anything_is_loaded(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    status, names, said = loaded(tmp_path, arguments, [*HEAVY, "numpy", "pyarrow", "PIL"])
    assert (status, names) == (2, [])
    assert says in said


def test_the_seeds_plan_is_checked_and_shown_without_torch_ray_and_mlflow() -> None:
    status, names, _ = loaded(ROOT, ["plan", "jobs/aliproducts.toml"], HEAVY)
    assert (status, names) == (0, [])


def test_a_forecast_a_driver_and_a_report_need_no_torch(tmp_path: Path) -> None:
    synthesise(tmp_path / "photos", classes=2, images=10, seed=0)
    sets = ["--set", f"catalogue.path={tmp_path / 'photos'}", "--storage", str(tmp_path / "runs"), "--gpus", "8"]
    status, names, _ = loaded(ROOT, ["plan", "jobs/aliproducts.toml", *sets], HEAVY)
    assert (status, names) == (0, [])
    program = "import sys, aliprod.cluster.driver, aliprod.report.page; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_commands_themselves_load_nothing_heavy(tmp_path: Path) -> None:
    status, names, _ = loaded(tmp_path, ["--help"], [*HEAVY, "numpy", "pyarrow", "PIL", "pydantic"])
    assert (status, names) == (0, [])


def test_predicting_with_weights_needs_neither_ray_nor_mlflow() -> None:
    program = "import sys, aliprod.inference.predict; sys.exit('ray' in sys.modules or 'mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_names_of_any_bytes_are_read_and_shown_where_the_locale_is_no_utf_8(tmp_path: Path) -> None:
    """PYTHONUTF8 and PYTHONCOERCECLOCALE keep Python from taking UTF-8 instead of a C locale, as it has by itself."""
    synthesise(tmp_path / "ph", classes=2, images=10, seed=0)
    folder, pictures = tmp_path / "gär" / "train" / "日本", sorted((tmp_path / "ph").rglob("*.jpg"))
    folder.mkdir(parents=True)
    for name, picture in zip([b"a.jpg", b"b.jpg", "grün.jpg".encode(), b"half\xff.jpg"], pictures, strict=False):
        shutil.copy(picture, folder / os.fsdecode(name))
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    command = [sys.executable, "-m", "aliprod", "data", "check", "gär", "--val", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | locale, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "train/日本/half".encode() in done.stdout
    assert b"3 of 3 images are readable" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "synth", "new", "--classes", "2", "--images", "10"],
        ["data", "prepare", "photos", "new"],
        ["init", "photos", "--out", "new"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_where_no_file_can_grow_one_sentence_says_so_and_nothing_half_made_stands_there(
    tmp_path: Path, arguments: list[str]
) -> None:
    synthesise(tmp_path / "photos", classes=2, images=10, seed=0)
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); from aliprod.cli import main; main()"
    )
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2), done.stderr
    assert "cannot be written: " in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments", [["plan", "jobs/aliproducts.toml", "--json"], ["--help"]])
def test_an_answer_that_a_full_disk_does_not_take_is_one_sentence(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "aliprod", *arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    said = "Error: standard output: cannot be written: No space left on device.\n  Make room."
    assert done.returncode == 1
    assert done.stderr.strip().endswith(said)
    assert "Traceback" not in done.stderr
