"""Where a plan runs: storage, tracking, cluster. A flag goes before the plan, the plan before the environment."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from aliprod.errors import Refused
from aliprod.plan.schema import Cluster, Plan
from aliprod.store import commit, mirror

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of a submitted job


@dataclass(frozen=True)
class Places:
    """Resolved places."""

    storage: Path  # absolute folder of all results
    tracking_uri: str = field(repr=False)  # of MLflow; by default SQLite in the storage folder
    address: str | None  # of Ray; None: a local one of our own
    note: str = ""  # what a person should know about a default that was taken; may be empty

    @property
    def artifacts(self) -> Path | None:
        """Where MLflow keeps files when it is SQLite in the storage folder; a server has its own place."""
        return self.storage / "mlartifacts" if self.tracking_uri.startswith("sqlite:") else None

    def of(self, plan: Plan) -> Path:
        """The folder of a plan's results."""
        return self.storage / plan.name


def resolve(plan: Plan | None, storage: Path | None, tracking_uri: str | None, address: str | None) -> Places:
    """Places from flags (any of them may be None), plan and environment."""
    says = plan.cluster if plan else Cluster()
    stated = storage or says.storage
    note = ""
    if stated is None and not os.environ.get("ALIPROD_STORAGE") and SUBMITTED in os.environ:
        stated = Path.home() / "aliprod"
        note = f"No --storage given: results go to {stated}, since a submitted job's own folder is thrown away."
    folder = default_storage(stated)
    uri = default_tracking_uri(folder, tracking_uri or says.tracking_uri)
    return Places(folder, uri, address or os.environ.get("RAY_ADDRESS"), note)


def default_storage(stated: Path | str | None = None) -> Path:
    """The absolute folder of all results: the stated one, that of the environment, or ``runs``. Of a URI, the mirror of
    its bucket, as the bucket is now. Refused: the URI names no bucket. Unreachable: the bucket does not answer."""
    place = stated or os.environ.get("ALIPROD_STORAGE") or "runs"
    if (mirrored := mirror.place(place)) is None:
        return Path(place).expanduser().absolute()
    commit.refresh(mirrored)
    return mirrored


def default_tracking_uri(storage: Path, stated: str | None = None) -> str:
    """Address of MLflow: the stated one, that of the environment, or SQLite in the storage folder."""
    if uri := stated or os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if odd := [character for character in "%?#" if character in str(storage)]:
        what = f"has a {odd[0]} in its path, which the address of MLflow's SQLite database cannot hold."
        raise Refused(what, storage, "Give another --storage, or a --tracking-uri.")
    return f"sqlite:///{storage / 'mlflow.db'}"


def catalogue_path(plan: Plan, places: Places) -> Path:
    """The catalogue's folder: the plan's path, or where its rendered one lies in the storage path. Refused: a URI names
    no bucket. Unreachable: the bucket does not answer."""
    synth = plan.catalogue.synth
    if plan.catalogue.path is not None or synth is None:
        return mirror.here(mirror.local(str(plan.catalogue.path)))
    return places.storage / "catalogues" / f"synth-{synth.classes}-{synth.images}-{synth.seed}"
