"""Pictures of a report, and of what MLflow shows of a plan: its jobs, their charts, a model's versions.

    python benchmarks/screenshots.py runs/quickstart/report.html shots/
    mlflow ui --backend-store-uri sqlite:///runs/mlflow.db &
    python benchmarks/screenshots.py http://127.0.0.1:5000 quickstart resnet50/dcl shots/

Needs chromium, MLflow also its driver and the extra `test` (apt-get install chromium chromium-driver). A report is seen
on a desk, a phone, a phone in the dark and paper; it is said how wide it is on a screen of 390 pixels.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver

PHONE = 390  # pixels
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--allow-file-access-from-files", "--disable-quic", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
_CLOSE = "//button[contains(@aria-label, 'lose')]"  # of MLflow's assistant, which takes a quarter of the window
_COLOURS = 64
_DARK = "--blink-settings=preferredColorScheme=0"
_FRAME = """<iframe src="{page}" width="{width}" height="900"></iframe><script>
onload = () => {{ const page = frames[0].document.documentElement;
document.body.dataset.seen = `${{page.scrollWidth}} ${{page.scrollHeight}}`; }}</script>"""


def browser() -> str | None:
    """The chromium of this machine."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def size(page: Path, width: int) -> tuple[int, int]:
    """How wide and high a page is on a screen of so many pixels; wider than that, it scrolls sideways."""
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(_FRAME.format(page=page.resolve().as_uri(), width=width))
        seen = re.search(r'data-seen="(\d+) (\d+)"', _chromium("--dump-dom", frame.as_uri()))
    if seen is None:
        raise RuntimeError("the browser did not say")
    return int(seen[1]), int(seen[2])


def shoot(page: Path, folder: Path) -> list[Path]:
    """Write desk.png, phone.png, dark.png, paper.pdf and report.png, figures without paths: docs/images has one."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, width, flags in (("desk", 1280, ()), ("phone", PHONE, ()), ("dark", PHONE, (_DARK,))):
        made.append(folder.resolve() / f"{name}.png")
        window = f"--window-size={width},{size(page, width)[1]}"
        _chromium(window, *flags, f"--screenshot={made[-1]}", page.resolve().as_uri())
    made.append(folder.resolve() / "report.png")
    with Image.open(made[0]) as desk:
        desk.convert("RGB").crop((0, 490, desk.width, 2400)).quantize(_COLOURS).save(made[-1], optimize=True)
    made.append(folder.resolve() / "paper.pdf")
    _chromium("--no-pdf-header-footer", f"--print-to-pdf={made[-1]}", page.resolve().as_uri())
    return made


def shoot_mlflow(uri: str, plan: str, job: str, folder: Path) -> None:
    """Write mlflow-jobs.png, mlflow-charts.png and mlflow-versions.png."""
    from mlflow import MlflowClient
    from selenium import webdriver

    experiment = MlflowClient(uri).get_experiment_by_name(plan)
    if experiment is None:
        raise SystemExit(f"{uri} has no experiment {plan}")
    runs = f"experiments/{experiment.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey=aliprod"
    model = f"models/{plan}.{job.replace('/', '.')}?workflowType=machine_learning"
    folder.mkdir(parents=True, exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = browser() or ""
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*_FLAGS, "--window-size=1600,1000", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        chrome = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            for name, page in {"jobs": runs, "charts": f"{runs}&compareRunsMode=CHART", "versions": model}.items():
                chrome.get(f"{uri}/#/{page}")
                _settle(chrome)
                for button in chrome.find_elements("xpath", _CLOSE)[:1]:
                    button.click()
                    _settle(chrome)
                path = folder / f"mlflow-{name}.png"
                chrome.save_screenshot(str(path))
                with Image.open(path) as shot:
                    shot.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
                print(path, path.stat().st_size, "bytes")
        finally:
            chrome.quit()


def _chromium(*arguments: str) -> str:
    if (program := browser()) is None:
        raise RuntimeError("there is no chromium on this machine: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        command = (program, *_FLAGS, f"--user-data-dir={profile}", *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def _settle(chrome: "WebDriver") -> None:
    """Wait until the page has said the same for four seconds."""
    said, since, end = "", time.monotonic(), time.monotonic() + 60
    while time.monotonic() < min(since + 4, end):
        time.sleep(0.5)
        seen = chrome.find_element("tag name", "body").text
        if seen != said or len(seen) < 200:
            said, since = seen, time.monotonic()


if __name__ == "__main__":
    if len(sys.argv) == 5:
        shoot_mlflow(*sys.argv[1:4], Path(sys.argv[4]))
    else:
        report, out = map(Path, sys.argv[1:])
        for path in shoot(report, out):
            print(path)
        print(f"{size(report, PHONE)[0]} pixels wide on a screen of {PHONE}")
