"""Reaching MLflow: the first call, the pre-flight, what its errors mean, and how a plan's page looks."""

import json
import logging
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from sqlalchemy.exc import SQLAlchemyError

from aliprod.errors import Refused, Unreachable
from aliprod.shown import redacted

PROBE = "aliprod wrote this to see whether artifacts can be written and read back.\n".ljust(1024, ".")

BEST = "best/top1_error"  # of all epochs so far
EPOCH, STATE = "aliprod.epoch", "aliprod.state"
VIEW = "mlflow.sharedViewState.aliprod"
_SHOWN = (BEST, "val/top1_error", "val/top5_error", "val/loss", "train/loss", "top1_error")
_COLUMNS = [
    *(f"tags.`{name}`" for name in (STATE, EPOCH)),
    *(f"metrics.`{name}`" for name in _SHOWN),
    *(f"attributes.`{name}`" for name in ("Dataset", "Version")),
]
_SECTIONS = ("best", "confusions", "val", "train", "lr", "speed")  # of charts, by the first word of a metric

_LOCK_SECONDS = 5.0  # longer than other drivers write
PLAIN = {  # of errors that come wrapped in three layers of libraries
    "Connection refused": "the connection is refused",
    "Failed to resolve": "the name of its host is not known",
    "timed out": "no answer in time",
    "Connection reset": "the connection broke off",
    "Connection aborted": "the connection broke off",
    "error responses": "it answers with errors of its own",  # 500, 503
    "Invalid Host header": "it refuses the name of its host",
}


@dataclass(frozen=True)
class Server:
    """An MLflow that has answered."""

    uri: str  # of its tracking server or database; may hold a password, so never print it
    client: MlflowClient
    experiment: str = ""  # "" where none was asked for
    experiment_id: str = ""

    def probe(self) -> None:
        """A small real call; raises what MLflow raises. One that writes, as a locked or full database still reads: how
        the plan's page looks."""
        if self.experiment_id:
            self.client.set_experiment_tag(self.experiment_id, VIEW, saved_view())
        else:
            self.client.search_experiments(max_results=1)

    def artifacts(self, location: str) -> ArtifactRepository:
        return get_artifact_repository(location, tracking_uri=self.uri, registry_uri=self.uri)

    def page(self, fragment: str) -> str:
        """The address of a page of the UI, such as ``models/NAME``; how to open the UI where no server runs."""
        if self.uri.startswith("http"):
            return f"{redacted(self.uri).rstrip('/')}/#/{fragment}"
        return f"http://127.0.0.1:5000/#/{fragment} after `mlflow ui --backend-store-uri {redacted(self.uri)}`"


def reach(uri: str) -> Server:
    """Make the first call, which in a fresh database runs all migrations: alone, before any other process.

    Raises:
        Refused: the address is of a kind that cannot work.
        Unreachable: nothing answers within about 10 s, refuses us, or its database is of another version.
    """
    for name in ("mlflow.store.db.utils", "alembic"):  # 50 lines of migrations; a page of traceback while away
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with asking(uri):
        _check_address(uri)
        _make_default(uri)
        server = Server(uri, MlflowClient(tracking_uri=uri, registry_uri=uri))
        server.probe()
    return server


def connect(uri: str, experiment: str, artifacts: Path | None) -> Server:
    """Reach MLflow, find or make the experiment, write and read back an artifact of 1 KB.

    ``artifacts``: where a new experiment keeps them, where no server decides it. Refused, Unreachable: as in `reach`.
    """
    server = reach(uri)
    with asking(uri):
        there = _experiment(server.client, experiment, None if uri.startswith("http") else artifacts)
        _try_artifacts(server.artifacts(there.artifact_location))
        server = replace(server, experiment=experiment, experiment_id=there.experiment_id)
        server.probe()
    return server


@contextmanager
def asking(uri: str) -> Iterator[None]:
    """Turn what MLflow raises into Unreachable: one sentence, without the password of the address."""
    try:
        yield
    except (MlflowException, OSError, SQLAlchemyError, ImportError) as error:  # the last: a database's driver
        raise Unreachable(
            f"MLflow does not answer: {sentence(error).rstrip('.')}.", redacted(uri), _advice(uri, error)
        ) from error


@contextmanager
def suppress_missing() -> Iterator[None]:
    """Go on where MLflow says that the thing asked for is not there."""
    try:
        yield
    except MlflowException as error:
        unknown_alias = error.error_code == "INVALID_PARAMETER_VALUE" and "alias" in str(error).lower()
        if not unknown_alias and error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            raise


def sentence(error: BaseException) -> str:
    """What an error says, in one short line and without passwords."""
    text = redacted(str(error)).strip() or type(error).__name__
    for sign, plain in PLAIN.items():
        if sign in text:
            return plain
    line = text.splitlines()[0]
    return line if len(line) <= 300 else line[:297] + "..."


def _check_address(uri: str) -> None:
    try:
        scheme = urlsplit(uri).scheme
    except ValueError as error:
        raise Refused(f"is no address: {error}.", redacted(uri), "Give http://HOST:PORT of a server.") from None
    if not scheme or scheme == "file":
        advice = "Give http://HOST:PORT of a server, or sqlite:////ABSOLUTE/mlflow.db."
        raise Refused("MLflow no longer keeps runs in a folder.", redacted(uri), advice)
    if scheme == "sqlite" and (path := Path(urlsplit(uri).path[1:])).exists():
        _check_lock(path)
    elif scheme == "sqlite":
        _make_database(path)


def _check_lock(path: Path) -> None:
    """Refuse a database that another process keeps locked; mlflow would wait for 20 s, and speak of a server."""
    try:
        with closing(sqlite3.connect(path, timeout=_LOCK_SECONDS)) as database:
            database.execute("BEGIN IMMEDIATE")
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):  # else mlflow says what is wrong
            advice = f"`fuser {path}` names the process that writes to it: wait, or end it. Nothing was started."
            raise Unreachable("another process keeps this SQLite locked.", path, advice) from error


def _make_database(path: Path) -> None:
    """Run all migrations beside a new database, then let it appear: one whose migrations were killed is of no use."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        fresh = Path(folder, path.name)
        MlflowClient(f"sqlite:///{fresh}", f"sqlite:///{fresh}").search_experiments(max_results=1)
        if not path.exists():  # another driver may have been faster
            fresh.replace(path)


def _experiment(client: MlflowClient, name: str, artifacts: Path | None) -> Experiment:
    there = client.get_experiment_by_name(name)
    if there is None:
        try:
            client.create_experiment(name, artifacts.absolute().as_uri() if artifacts else None)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver was first
                raise
        there = client.get_experiment_by_name(name)
    elif there.lifecycle_stage == "deleted":
        client.restore_experiment(there.experiment_id)  # its name is taken for ever, and a plan keeps its name
    if there is None:
        raise OSError(f"experiment {name} was made and is not there")
    return there


def _try_artifacts(repository: ArtifactRepository) -> None:
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "aliprod.txt")
        probe.write_text(PROBE)
        repository.log_artifact(str(probe), "preflight")
        back = repository.download_artifacts("preflight/aliprod.txt", tempfile.mkdtemp(dir=folder))
        if Path(back).read_text() != PROBE:
            raise OSError("the artifact read back is not the one that was written")


def _advice(uri: str, error: Exception) -> str:
    text = str(error)
    if "out-of-date database schema" in text:
        return f"Copy the database, then run: mlflow db upgrade {redacted(uri)}"
    if "Invalid Host header" in text:
        return "Start the server with --allowed-hosts naming the host of this address."
    if isinstance(error, MlflowException) and error.error_code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
        return "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
    start = "Nothing was started. Start the server, or give another --tracking-uri"
    return f"{start}; this client is MLflow {mlflow.__version__}."


def _make_default(uri: str) -> None:
    """For what looks at no argument: a database resolves a version's ``models:/m-ID`` through mlflow's default. mlflow
    puts the address, password and all, into the environment too, where the next plan of this process would take it for
    the user's: taken out again."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before


def saved_view() -> str:
    """How a plan's page looks, a tag of the experiment: the runs of jobs and ensembles, the best first, and charts.

    Without it MLflow folds the jobs' runs below the plan's, and draws only what is unfolded. The words are those of the
    UI of MLflow 3.17; an older one shows its own columns.
    """
    state: dict[str, Any] = {"searchFilter": "tags.`aliprod.kind` != 'plan'", "runsHiddenMode": "FIRST_20_RUNS"}
    state |= {"orderByKey": f"metrics.`{BEST}`", "orderByAsc": True}
    state |= {"selectedColumns": _COLUMNS, "columnOrder": _COLUMNS}
    sections = [{"uuid": name, "name": name, "display": True, "columns": 2} for name in _SECTIONS]
    state |= {"compareRunSections": sections, "isAccordionReordered": True, "compareRunCharts": []}  # MLflow adds some
    return json.dumps({"name": "jobs", "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def view_page(experiment_id: str, charts: bool = False) -> str:
    """The view's place in the UI, below ``/#/``. Without the first word it opens a view of language models."""
    words = {"workflowType": "machine_learning", "viewStateShareKey": VIEW.rpartition(".")[2]}
    return f"experiments/{experiment_id}/runs?{urlencode(words | ({'compareRunsMode': 'CHART'} if charts else {}))}"
