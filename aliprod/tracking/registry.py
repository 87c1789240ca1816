"""Versions of registered models: what a person picks from, and what was picked, by an alias or as the best."""

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

from mlflow.entities import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from aliprod.build.graph import best
from aliprod.errors import Failed, Refused, Unreachable, did_you_mean, listing
from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened
from aliprod.store import commit, lineage
from aliprod.store.layout import LAST, MODEL, WEIGHTS
from aliprod.tracking.server import Server, asking, reach, suppress_missing


@dataclass(frozen=True)
class Choice:
    """A version of a registered model, known by the bytes of its weights."""

    name: str  # of the registered model
    version: int | None  # None while MLflow does not have it
    key: str  # of the job that trained it
    sha256: str  # of model.safetensors
    epoch: int  # from 0
    source: str  # ``models:/m-ID`` of the logged model that holds the files; "" while MLflow does not have it

    @property
    def model_id(self) -> str:
        return self.source.removeprefix("models:/")


@dataclass(frozen=True)
class Weights:
    """A committed weights folder."""

    folder: Path
    sha256: str
    epoch: int
    top1_error: float | None
    kind: str

    @classmethod
    def read(cls, folder: Path) -> "Weights | None":
        """None where nothing is committed."""
        if commit.read(folder) is None:
            return None
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return cls(
            folder, commit.digests(folder)[MODEL], config["epoch"], config["top1_error"], config.get("kind", "raw")
        )


class Registry:
    """The registered models of one plan. Every method blocks, and may find MLflow Unreachable."""

    def __init__(self, server: Server) -> None:
        self._server, self._client = server, server.client

    def name(self, job: str) -> str:
        """The registered model of a job: PLAN.BACKBONE.STAGE."""
        return f"{self._server.experiment}.{job.replace('/', '.')}"

    def members(self, names: Iterable[str]) -> dict[str, Choice]:
        """The version that the alias ``member`` of each job's model marks. Refused: a model has no such alias, or it
        marks a version that aliprod did not write."""
        with asking(self._server.uri):
            found = {name: self._version(self.name(name), alias="member") for name in names}
        if missing := [self.name(name) for name, version in found.items() if version is None]:
            raise Refused(
                f"{listing(missing)}: no version has the alias `member`, so nothing says which one the ensemble takes.",
                advice=f"Give it to a version, under Aliases, on {self._server.page(f'models/{missing[0]}')}\n"
                "The same command again gives it to the best, also where somebody has deleted the model.",
            )
        return {name: self._choice(version) for name, version in found.items() if version is not None}

    def resolve(self, model: str) -> Choice:
        """The version that ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` names. Refused: it is neither, or there
        is no such model, alias or version."""
        parts = re.fullmatch(r"models:/([^/@:]+)(?:@([^/@]+)|/(\d+))", model)
        if parts is None:
            raise Refused("is no address of a model.", model, "Write models:/NAME@ALIAS or models:/NAME/VERSION.")
        name, alias, number = parts.groups("")
        with asking(self._server.uri):
            version = self._version(name, alias, number)
        if version is None:
            raise Refused("there is no such version.", model, self._nearest(name, alias))
        return self._choice(version)

    def download(self, choice: Choice, folder: Path) -> None:
        """Bring a version's files into ``folder``, committed, with the manifest that they were written with. Failed:
        they are not there, or not the bytes that the version's sha256 names."""
        with tempfile.TemporaryDirectory() as temporary:
            got = Path(temporary)
            with asking(self._server.uri), suppress_missing():
                model = self._client.get_logged_model(choice.model_id)
                self._server.artifacts(model.artifact_location).download_artifacts("", temporary)
            record = commit.read(got)
            if record is None or commit.verify(got) or commit.digests(got)[MODEL] != choice.sha256:
                page = self._server.page(f"models/{choice.name}")
                raise Failed(
                    f"version {choice.version} of {choice.name} does not hold the weights {choice.sha256[:12]} that "
                    "its tag sha256 names.",
                    advice=f"Choose another version on {page}, or run the plan again: it sends the files anew while "
                    "they are in the storage path.",
                )
            commit.write(folder, lambda staging: _copy(got, staging), record)

    def find(self, name: str, key: str, sha256: str) -> Choice | None:
        """The oldest version of these weights."""
        query = f"name = '{name}' and tags.`key` = '{key}' and tags.`sha256` = '{sha256}'"
        found = self._client.search_model_versions(query)
        return self._choice(min(found, key=lambda version: int(version.version))) if found else None

    def publish(self, job: Job, run_id: str, weights: Weights, checkpoint: str) -> Choice:
        """The version of these weights, its job's ``checkpoint`` ("best", "last" or "best, last"); made where there is
        none."""
        name, key = self.name(job.name), str(job.key)
        if choice := self.find(name, key, weights.sha256):
            self._restore(choice.model_id, weights.folder)
            return choice
        error, epoch = weights.top1_error, weights.epoch + 1
        told = "" if error is None else f"{error:.2%} at "  # MLflow's table cuts it after 27 characters
        description = f"{told}epoch {epoch}/{job.stage.epochs}, {checkpoint}: top-1 error on val, of {key[:12]}"
        scored = "unknown" if error is None else f"{error:.4f}"
        tags = {"epoch": str(epoch), "top1_error": scored, "checkpoint": checkpoint}
        self._model(name)
        model_id = self._logged_model(job, run_id, weights)
        version = self._client.create_model_version(
            name,
            source=f"models:/{model_id}",
            run_id=run_id,
            tags=tags | {"key": key, "sha256": weights.sha256},
            description=description,
            model_id=model_id,
            await_creation_for=0,
        )
        return self._choice(version)

    def point(self, job: str, choice: Choice) -> None:
        """Alias ``best`` marks this version; ``member`` too, unless a person has moved it.

        A person has where the alias is neither missing nor where we last put it. The alias moves before the tags
        that remember it: killed in between, the next call finds it in place and only writes the tags.
        """
        name, best = self.name(job), str(choice.version)
        model = self._model(name)
        aliases = {alias: str(version) for alias, version in model.aliases.items()}  # a database hands out int
        if aliases.get("best") != best:
            self._client.set_registered_model_alias(name, "best", best)
        member, ours = aliases.get("member"), model.tags.get("aliprod.member_version")
        if member not in (None, ours, best):
            return
        if member != best:
            self._client.set_registered_model_alias(name, "member", best)
        if ours != best:
            self._client.set_registered_model_tag(name, "aliprod.member_set_by", "auto")
            self._client.set_registered_model_tag(name, "aliprod.member_version", best)

    def _model(self, name: str) -> RegisteredModel:
        try:
            return self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return self._client.get_registered_model(name)

    def _logged_model(self, job: Job, run_id: str, weights: Weights) -> str:
        """The id of a READY logged model with these files; one that a killed driver left PENDING is deleted."""
        experiment = self._server.experiment_id
        tags = {"aliprod.key": str(job.key), "aliprod.sha256": weights.sha256}
        mine = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        for model in self._client.search_logged_models([experiment], filter_string=mine):
            if model.status == LoggedModelStatus.READY:  # filtered here: the server's filter finds nothing
                return str(model.model_id)
            self._client.delete_logged_model(model.model_id)
        model = self._client.create_logged_model(
            experiment,
            name=f"{re.sub('[./]', '-', job.name)}-epoch{weights.epoch + 1:03d}",
            source_run_id=run_id,
            tags=tags | {"aliprod.job": job.name},
            model_type="weights",
        )
        commit.fetch(weights.folder)
        self._client.log_model_artifacts(model.model_id, str(weights.folder))
        self._client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def _restore(self, model_id: str, folder: Path) -> None:
        """Send the files again where the artifacts were lost and the database kept."""
        there = {file.path: file.file_size for file in self._client.list_logged_model_artifacts(model_id)}
        commit.fetch(folder)
        if any(there.get(path.name) != path.stat().st_size for path in folder.iterdir()):
            self._client.log_model_artifacts(model_id, str(folder))

    def _version(self, name: str, alias: str, number: str = "") -> ModelVersion | None:
        """The version with this alias or, where it is "", this number; None where there is none."""
        with suppress_missing():
            if alias:
                return self._client.get_model_version_by_alias(name, alias)
            return self._client.get_model_version(name, number)
        return None

    def _choice(self, version: ModelVersion) -> Choice:
        """A version as a choice; its tags become paths, and anybody may have written them, so they are checked."""
        key, sha256, epoch = (version.tags.get(name, "") for name in ("key", "sha256", "epoch"))
        source = version.source or ""
        hashes = all(re.fullmatch("[0-9a-f]{64}", value) for value in (key, sha256))
        if not hashes or not re.fullmatch("models:/m-[0-9a-zA-Z]+", source):
            raise Refused(
                f"version {version.version} of {version.name} was not written by aliprod: its tags key and sha256 are "
                "no hashes, or its source is no logged model.",
                advice=f"Give the alias to another version on {self._server.page(f'models/{version.name}')}",
            )
        number = int(epoch) - 1 if epoch.isdecimal() else -1
        return Choice(version.name, int(version.version), key, sha256, number, source)

    def _nearest(self, name: str, alias: str) -> str:
        models = {model.name: model for model in self._client.search_registered_models(max_results=1000)}
        if name not in models:
            return f"{did_you_mean(name, models)} Registered models: {listing(models) or 'none'}.".strip()
        aliases = models[name].aliases
        return f"{did_you_mean(alias, aliases)} Aliases of {name}: {listing(aliases) or 'none'}.".strip()


def choose(opened: Opened, registry: Registry, complete: bool) -> tuple[dict[str, Choice], str]:
    """The version that the alias ``member`` of each member marks, all of which are trained, and what a person should
    know about the choice, or ''. While MLflow is away, or not ``complete``, the one last seen counts, at first the
    best."""
    names, file = opened.plan.ensemble.members, opened.folder / lineage.MEMBERS
    try:
        if not complete:
            raise Unreachable("it lacks what this run has yet to send.")
        choices, note = registry.members(names), ""
    except Unreachable as error:
        seen = {name: Choice(**choice) for name, choice in commit.read_json(file).items()}
        same = {n: choice for n, choice in seen.items() if n in names and choice.key == opened.jobs[n].key}
        choices = {name: _best(opened, name, registry.name(name)) for name in names} | same
        note = f"MLflow is away ({error.what}) The choice of checkpoints last seen counts, else each job's best."
    commit.write_file(file, json.dumps({name: asdict(choice) for name, choice in choices.items()}, indent=1))
    others = [name for name, choice in choices.items() if choice.key != opened.jobs[name].key]
    if others:
        note = f"{note} Chosen from another state of the plan: {', '.join(others)}.".strip()
    return choices, note


def origin(opened: Opened, choices: Mapping[str, Choice], key: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """What a submission (an ensemble with this key and result) was made of, as `aliprod trace` shows it."""
    plan, catalogue = opened.plan, opened.read_catalogue()
    fitted = result["comparison"]["members"] if plan.ensemble.combine != "sum" else {}
    return {
        "members": {
            name: {"version": choice.version, "epoch": choice.epoch, "weights": choice.sha256, "key": choice.key}
            | {"kind": _kind(opened, name, choice)}
            | {key: fitted[name][key] for key in ("weight", "temperature") if fitted}
            for name, choice in choices.items()
        },
        "plan": {"name": plan.name, "sha256": plan.digest, "settings": plan.model_dump(mode="json")},
        "catalogue": {"path": str(catalogue.root), "fingerprint": catalogue.fingerprint},
        "ensemble": key,
        "top1_error": result["top1_error"],
        "split": result["split"],
    }


def _kind(opened: Opened, name: str, choice: Choice) -> str:
    """Which weights of its epoch a choice has (`aliprod.store.epochs.KINDS`); '' where another state trained them."""
    found = (Weights.read(opened.job_folder(name) / part) for part in (WEIGHTS, LAST))
    return next((one.kind for one in found if one and one.sha256 == choice.sha256), "")


def _best(opened: Opened, name: str, model: str) -> Choice:
    """The best checkpoint of a finished job, as the storage path has it."""
    found, record = best(opened, name), opened.record(name) or {}
    if found is None:
        raise ValueError(f"{name} is not trained, {WEIGHTS} are missing")
    return Choice(model, None, found.key, found.sha256, int(record.get("best_epoch", -1)), "")


def fetch(model: str, uri: str, folder: Path) -> lineage.Voice:
    """Bring the weights that ``models:/NAME@ALIAS`` names to a committed folder below ``folder``, once."""
    registry = Registry(reach(uri))
    choice = registry.resolve(model)
    there = folder / choice.sha256[:16]
    if commit.read(there) is None:
        registry.download(choice, there)
    return lineage.Voice(there, version=choice.version)


def _copy(source: Path, target: Path) -> None:
    copytree(source, target, ignore=ignore_patterns(commit.MANIFEST), dirs_exist_ok=True)
