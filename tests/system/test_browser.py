"""What a person does in MLflow's pages, in a real browser: look at a plan's jobs, and choose another checkpoint."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support import expected_conditions
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with its chromedriver on this machine")

JOB, MODEL = "efficientnet/full", "tiny.efficientnet.full"
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync --window-size=2400,1000"""
# So slow that its second epoch is no better than its first: it leaves a best and a last checkpoint.
SETS = ('jobs={efficientnet=["full"]}', f'ensemble.members=["{JOB}"]', "stages.full.epochs=2")
SETS += ("stages.full.lr={backbone=1e-7,heads=1e-7}",)


class Browser:
    """A Chromium with a profile of its own, in a window wide enough for MLflow's columns."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))

    def text(self, *words: str) -> str:
        """What the page says, once it says all of these."""
        body = (By.TAG_NAME, "body")
        for word in words:
            WebDriverWait(self.driver, 60).until(expected_conditions.text_to_be_present_in_element(body, word), word)
        return self.driver.find_element(*body).text

    def click(self, xpath: str) -> None:
        WebDriverWait(self.driver, 60).until(expected_conditions.element_to_be_clickable((By.XPATH, xpath))).click()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.driver.quit()


@pytest.fixture(scope="module")
def arguments(cluster: Any, server: Any, plan: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Those of a run of one job, which has been made."""
    storage = tmp_path_factory.mktemp("storage")
    sets = [word for name in SETS for word in ("--set", name)]
    given = [str(plan), "--storage", str(storage), "--tracking-uri", server.uri, "--address", cluster.address, *sets]
    process = cluster.start_alone("run", *given)
    out, log = process.communicate(timeout=600)
    assert process.returncode == 0, log
    assert f"MLflow: {server.uri}/#/experiments/" in log + out
    return given


def page_of(server: Any) -> str:
    from mlflow import MlflowClient

    experiment = MlflowClient(server.uri).get_experiment_by_name("tiny").experiment_id
    return f"{server.uri}/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey=aliprod"


def test_the_link_of_a_run_opens_a_table_of_its_jobs(browser: Browser, server: Any, arguments: list[str]) -> None:
    browser.driver.get(page_of(server))
    browser.text(JOB, "ensemble", "2/2", "finished", "aliprod.epoch", "best/top1_error")


def test_charts_of_jobs_are_not_empty_and_confusions_are_pictures(
    browser: Browser, server: Any, arguments: list[str]
) -> None:
    browser.driver.get(f"{page_of(server)}&compareRunsMode=CHART")
    said = browser.text("best", "val", "confusions")
    assert "(0)" not in said.split("speed")[0], "no section of ours is empty"
    assert browser.driver.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .lines path")
    image = (By.XPATH, "//img[contains(@src, 'confusions')]")
    WebDriverWait(browser.driver, 60).until(expected_conditions.presence_of_element_located(image))


def test_a_version_chosen_by_clicking_is_the_one_that_the_ensemble_takes(
    browser: Browser, server: Any, arguments: list[str], cluster: Any
) -> None:
    browser.driver.get(f"{server.uri}/#/models/{MODEL}/versions/2?workflowType=machine_learning")
    browser.text("at epoch 2/2, last: top-1 error on val")
    browser.click("//button[@title='Add aliases']")
    browser.text("Save aliases")
    entry = browser.driver.find_element(By.XPATH, "//div[@role='dialog']//input[@role='combobox']")
    entry.send_keys("member", Keys.ENTER)
    browser.text("also being used on version 1")
    browser.click("//button[contains(., 'Save aliases')]")
    browser.text("member")
    command = [sys.executable, str(Path(__file__).parents[2] / "jobs" / "ensemble.py"), *arguments, "--json"]
    made = subprocess.run(command, env=cluster.environment, check=True, capture_output=True, text=True, timeout=600)
    assert json.loads(made.stdout.splitlines()[-1])["members"][JOB]["version"] == 2
