"""Pictures of a plan's jobs, their charts and a model's versions, as MLflow shows them, in 64 colours.

    mlflow ui --backend-store-uri sqlite:///runs/mlflow.db &
    python benchmarks/screenshots_mlflow.py http://127.0.0.1:5000 quickstart resnet50/dcl shots

Needs chromium and its driver (apt-get install chromium chromium-driver) and the extra `test`.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

from mlflow import MlflowClient
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

_FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync --window-size=1600,1000"""
_CLOSE = "//button[contains(@aria-label, 'lose')]"  # of the assistant, which takes a quarter of the window
_COLOURS = 64


def shoot(uri: str, plan: str, job: str, folder: Path) -> None:
    """Write mlflow-jobs.png, mlflow-charts.png and mlflow-versions.png."""
    experiment = MlflowClient(uri).get_experiment_by_name(plan)
    if experiment is None:
        raise SystemExit(f"{uri} has no experiment {plan}")
    runs = f"experiments/{experiment.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey=aliprod"
    model = f"models/{plan}.{job.replace('/', '.')}?workflowType=machine_learning"
    folder.mkdir(parents=True, exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*_FLAGS.split(), f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            for name, page in {"jobs": runs, "charts": f"{runs}&compareRunsMode=CHART", "versions": model}.items():
                browser.get(f"{uri}/#/{page}")
                _settle(browser)
                for button in browser.find_elements(By.XPATH, _CLOSE)[:1]:
                    button.click()
                    _settle(browser)
                path = folder / f"mlflow-{name}.png"
                browser.save_screenshot(str(path))
                with Image.open(path) as shot:
                    shot.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
                print(path, path.stat().st_size, "bytes")
        finally:
            browser.quit()


def _settle(browser: webdriver.Chrome) -> None:
    """Wait until the page has said the same for four seconds."""
    said, since, end = "", time.monotonic(), time.monotonic() + 60
    while time.monotonic() < min(since + 4, end):
        time.sleep(0.5)
        seen = browser.find_element(By.TAG_NAME, "body").text
        if seen != said or len(seen) < 200:
            said, since = seen, time.monotonic()


if __name__ == "__main__":
    shoot(*sys.argv[1:4], Path(sys.argv[4]))
