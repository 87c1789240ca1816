"""Where a plan runs: storage, tracking, cluster. A flag goes before the plan, the plan before the environment."""

import os
from dataclasses import dataclass
from pathlib import Path

from aliprod.plan.schema import Plan

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of a submitted job


@dataclass(frozen=True)
class Places:
    """Resolved places.

    Attributes:
        storage: absolute folder of all results.
        tracking_uri: of MLflow; by default SQLite in the storage folder.
        address: of Ray; None: a local one of our own.
        note: what a person should know about a default that was taken; may be empty.
    """

    storage: Path
    tracking_uri: str
    address: str | None
    note: str = ""

    @property
    def artifacts(self) -> Path | None:
        """Where MLflow keeps files when it is SQLite in the storage folder; a server has its own place."""
        return self.storage / "mlartifacts" if self.tracking_uri.startswith("sqlite:") else None

    def of(self, plan: Plan) -> Path:
        """The folder of a plan's results."""
        return self.storage / plan.name


def resolve(plan: Plan, storage: Path | None, tracking_uri: str | None, address: str | None) -> Places:
    """Places from flags (any of them may be None), plan and environment."""
    chosen = storage or plan.cluster.storage or os.environ.get("ALIPROD_STORAGE")
    note = ""
    if chosen is None and SUBMITTED in os.environ:
        chosen = Path.home() / "aliprod"
        note = f"No --storage given: results go to {chosen}, since a submitted job's own folder is thrown away."
    folder = Path(chosen or "runs").expanduser().absolute()
    default_uri = f"sqlite:///{folder / 'mlflow.db'}"
    uri = tracking_uri or plan.cluster.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri
    return Places(folder, uri, address or os.environ.get("RAY_ADDRESS"), note)


def catalogue_path(plan: Plan, places: Places) -> Path:
    """The catalogue's folder: the plan's path, or where its rendered one lies in the storage path."""
    synth = plan.catalogue.synth
    if plan.catalogue.path is not None or synth is None:
        return Path(str(plan.catalogue.path))
    return places.storage / "catalogues" / f"synth-{synth.classes}-{synth.images}-{synth.seed}"
