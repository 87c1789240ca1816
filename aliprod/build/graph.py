"""The graph of a plan: all that it makes, from the catalogue to the submission. How: `aliprod.build.making`."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple

from aliprod.build import making
from aliprod.build.costs import cost_of, images_of
from aliprod.build.room import Node, uses_gpu, with_cpus
from aliprod.build.target import Cost, Resources, Target, powers_of_two
from aliprod.catalogue.catalogue import Catalogue
from aliprod.errors import Refused
from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened
from aliprod.plan.schema import Cluster
from aliprod.store import commit
from aliprod.store.layout import FEATURES, HASHES, KEPT, MODEL, WEIGHTS, job_place, key_of, newest_step
from aliprod.store.lineage import weights_folder
from aliprod.store.resumable import SHARD_ROWS, shards

LEAST_VAL = 5  # images that weights of members are fitted on: one in each fold
TINY = ("checkpoint", "comparison", "hashes", "kept_rows", "pseudo_labels", "weights")  # kinds that take no room
_UNKNOWN = Cost(known=False)


class Chosen(NamedTuple):
    """Weights that a member takes: the key of the job that trained them, and the sha256 of model.safetensors."""

    key: str
    sha256: str


class Splits(NamedTuple):
    """Which images are predicted: ``main`` makes the submission, ``scored`` (where labels are known) the errors."""

    main: str
    scored: str | None


def splits(catalogue: Catalogue, score: Literal["auto", "val"]) -> Splits:
    """Test, and val where the labels of test are not known, or val is asked for; val alone where there is no test."""
    labelled = len(catalogue.test) and catalogue.test_labels is not None and score == "auto"
    scored = "test" if labelled else ("val" if len(catalogue.val) else None)
    return Splits("test" if len(catalogue.test) else "val", scored)


def targets(
    opened: Opened, gpu: bool, chosen: Mapping[str, Chosen] | None = None, lost: Collection[str] = ()
) -> dict[str, Target]:
    """All targets of a plan by name, each behind its needs. ``gpu``: whether a rank takes one. ``chosen``: the
    checkpoints of members, by job; of the others the best. ``lost``: jobs that the ensemble is not compared with.
    Refused: there is no catalogue, or weights of members are to be fitted on a val of too few images."""
    graph = _Graph(opened, gpu, chosen or {})
    for name, job in opened.jobs.items():
        graph.training(name)
        if job.member:
            for split in graph.predicted:
                graph.member(name, split)
    for split in graph.summed:
        graph.ensemble(split)
    if graph.splits.scored:
        graph.comparison(graph.splits.scored, lost)
    return graph.found


def targets_on(opened: Opened, nodes: Sequence[Node]) -> dict[str, Target]:
    """The targets of a plan as they would be made on these nodes."""
    cluster = opened.plan.cluster
    return targets(opened.with_cluster(with_cpus(cluster, nodes)), uses_gpu(cluster, nodes))


def best(opened: Opened, name: str) -> Chosen | None:
    """The best checkpoint of a job; None while it is not trained."""
    folder = opened.job_folder(name) / WEIGHTS
    if commit.read(folder) is None:
        return None
    return Chosen(str(opened.jobs[name].key), commit.digests(folder)[MODEL])


def world_sizes(job: Job, cluster: Cluster) -> tuple[int, ...]:
    """The numbers of ranks that a job may have: its shares can be dealt to each; one where nothing is trained."""
    fewest, most = cluster.ranks_of(job.name)
    if not job.stage.is_trained:
        return (1,)
    if job.stage.shares == "ranks":
        return (most,)
    return tuple(size for size in powers_of_two(job.stage.shares) if fewest <= size <= most)


class _Graph:
    """A graph on its way: each target once, behind its needs."""

    def __init__(self, opened: Opened, gpu: bool, chosen: Mapping[str, Chosen]) -> None:
        self.opened, self.plan, self.chosen = opened, opened.plan, chosen
        self.found: dict[str, Target] = {}
        self.best = cache(partial(best, opened))  # it reads two manifests
        self.catalogue, self.views = opened.read_catalogue(), opened.plan.ensemble.views
        self.splits = splits(self.catalogue, self.plan.ensemble.score)
        self.fits = self.plan.ensemble.combine != "sum"
        self.summed = dict.fromkeys(split for split in self.splits if split)
        self.predicted = self.summed | (dict.fromkeys(["val"]) if self.fits else {})
        self.rank = Resources(self.plan.cluster.threads, 1 if gpu else 0)  # of a training, and of what runs a network

    def training(self, name: str) -> Target:
        """A job's training. A soup and a bank of features, which train nothing, are trainings too."""
        if name in self.found:
            return self.found[name]
        job = self.opened.jobs[name]
        stage, start = job.stage, [self.training(job.start)] if job.start else []
        fetched = stage.pretrained is True and not job.start and not job.soup
        roles = {
            "start": start,
            "soup": [self.training(other) for other in job.soup],
            "teachers": [self.soft_labels(job, teacher) for teacher in stage.teachers],
            "pseudo_labels": [self.pseudo_labels(job)] if job.labellers else [],
            "kept": [self.kept_rows(job, start)] if stage.duplicates != "keep" else [],
            "pretrained": [self.pretrained(job.network)] if fetched else [],
        }
        needs = {role: tuple(found) for role, found in roles.items() if found}
        if stage.features == "cached":
            begin = {role: found for role, found in needs.items() if role in ("start", "pretrained")}
            known = ("train", "val") if len(self.catalogue.val) else ("train",)
            needs["features"] = tuple(self.features(job, split, begin) for split in known)
        place, make = f"{job_place(name, str(job.key))}/{WEIGHTS}", making.train
        cost = cost_of(job, self.catalogue, newest_step(self.opened.job_folder(name)) or 0)
        sizes, rank = world_sizes(job, self.plan.cluster), self.rank
        return self._add(Target("training", name, job.facts, place, make, needs, cost, rank, sizes, job, goal=True))

    def pretrained(self, network: str) -> Target:
        """A network's ImageNet weights, which cannot always be had: fetched before anything is started."""
        facts, place = {"kind": "pretrained", "network": network}, f"pretrained/{network}"
        name = f"{network} weights"
        return self._add(Target("pretrained", name, facts, place, making.fetch, cost=_UNKNOWN, first=True))

    def hashes(self) -> Target:
        """The hashes of all training images, once for a catalogue."""
        facts = {"kind": "hashes", "catalogue": self.catalogue.fingerprint}
        place, cpus = f"{HASHES}/{self.catalogue.fingerprint}", Resources(self.rank.cpus, 0)
        return self._add(Target("hashes", "hashes", facts, place, making.hash_images, cost=_UNKNOWN, resources=cpus))

    def kept_rows(self, job: Job, start: list[Target]) -> Target:
        """The training images that a job's filter of duplicates leaves, judged by the weights that it starts from."""
        name, facts = f"{job.name} kept rows", {"kind": "kept_rows", "job": job.key}
        place, make = f"{job_place(job.name, str(job.key))}/{KEPT}", making.filter_rows
        needs = {"hashes": (self.hashes(),), "start": tuple(start)}
        return self._add(Target("kept_rows", name, facts, place, make, needs, resources=self.rank, job=job))

    def soft_labels(self, job: Job, name: str) -> Target:
        """A teacher's soft labels of the images of a job; shared by jobs of the same images."""
        teacher, images = self.training(name), making.shown_to_teachers(job.stage)
        facts = {"kind": "soft_labels", "teacher": teacher.key, "images": images}
        name = f"{name} soft labels of {'all images' if images == 'all' else key_of(images)[:8]}"
        place = f"{job_place(teacher.name, str(teacher.key))}/soft_labels/{key_of(facts)[:16]}"
        cost = Cost(teacher.job, seen=int(images_of(job.stage, self.catalogue).sum()))
        sizes, needs = powers_of_two(-(-cost.seen // SHARD_ROWS)), {"teacher": (teacher,)}
        return self._add(Target("soft_labels", name, facts, place, making.teach, needs, cost, self.rank, sizes, job))

    def pseudo_labels(self, job: Job) -> Target:
        """Labels of test images, by what other jobs predict."""
        name, facts = f"{job.name} pseudo labels", {"kind": "pseudo_labels", "job": job.key}
        place = f"{job_place(job.name, str(job.key))}/pseudo_labels"
        needs = {"predictions": tuple(self.prediction(other, "test") for other in job.labellers)}
        return self._add(Target("pseudo_labels", name, facts, place, making.label, needs, job=job))

    def features(self, job: Job, split: str, begin: Mapping[str, tuple[Target, ...]]) -> Target:
        """Features of a split, by the weights that a job begins with: shared by all jobs that begin with them.
        ``begin``: ``start`` or ``pretrained``, where the weights are made by this run."""
        known = dict(job.facts or {})
        shared = {"kind": "features", "start": known["parents"].get("start"), "pooling": known.get("pooling")}
        shared |= {name: known[name] for name in ("network", "catalogue")}
        shared |= {name: known["stage"][name] for name in ("pretrained", "resize", "crop", "precision")}
        digest, cost = key_of(shared)[:16], Cost(job, seen=len(getattr(self.catalogue, split)))
        name, place = f"{job.start or job.network} features of {split} {digest[:8]}", f"{FEATURES}/{digest}/{split}"
        facts, sizes = shared | {"split": split}, powers_of_two(-(-cost.seen // SHARD_ROWS))
        return self._add(Target("features", name, facts, place, making.look, begin, cost, self.rank, sizes, job))

    def member(self, name: str, split: str) -> Target:
        """The prediction of a member's chosen checkpoint, else of its best."""
        chosen = self.chosen.get(name)
        if chosen is None or chosen == self.best(name):
            return self.prediction(name, split)
        return self._predict(self.checkpoint(name, chosen), chosen, split)

    def prediction(self, name: str, split: str) -> Target:
        """The prediction of a job's best checkpoint."""
        return self._predict(self.training(name), self.best(name), split)

    def checkpoint(self, name: str, chosen: Chosen) -> Target:
        """Weights that a person has chosen, of a job or of an earlier state of it."""
        storage = self.opened.places.storage
        facts = {"kind": "checkpoint", "key": chosen.key, "weights": chosen.sha256}
        place = weights_folder(storage, self.plan.name, name, *chosen).relative_to(storage).as_posix()
        job = self.opened.jobs[name]
        return self._add(Target("checkpoint", f"{name} {chosen.sha256[:12]}", facts, place, making.bring, job=job))

    def ensemble(self, split: str) -> Target:
        """The sum of the members' probabilities of a split, what it predicts, and its errors."""
        members = [self.member(name, split) for name in self.plan.ensemble.members]
        fitted = [self.weights()] if self.fits else []
        facts = _of_members({"kind": "ensemble", "split": split}, members)
        if facts and fitted:
            facts["weights"] = fitted[0].key
        name, place = f"ensemble of {split}", f"{self.plan.name}/ensemble-{split}"
        if split == self.splits.main:  # what people open
            name, place = "ensemble", f"{self.plan.name}/ensemble"
        needs, make = {"members": tuple(members), "weights": tuple(fitted)}, making.add_up
        return self._add(Target("ensemble", name, facts, place, make, needs, goal=True, latest=True))

    def weights(self) -> Target:
        """Weights and temperatures of the members, fitted on their predictions of val."""
        plan, combine, count = self.plan, self.plan.ensemble.combine, len(self.catalogue.val)
        if count < LEAST_VAL:
            what = f'combine = "{combine}" is fitted on val, which has {count} images, not the {LEAST_VAL} it takes.'
            advice = 'Say combine = "sum", or hold images back: [catalogue] val = 0.1.'
            raise Refused(what, f"plan {plan.name}, [ensemble]", advice)
        members = [self.member(name, "val") for name in plan.ensemble.members]
        facts = _of_members({"kind": "weights", "combine": combine, "seed": plan.seed}, members)
        place, needs = f"{plan.name}/weights", {"members": tuple(members)}
        return self._add(Target("weights", "weights", facts, place, making.fit, needs, latest=True))

    def comparison(self, split: str, lost: Collection[str]) -> Target:
        """What the ensemble of labelled images is worth: `aliprod.ensemble.compare`, with its best member, and the
        floors that it is to beat, but for those that are lost."""
        plan, summed = self.plan, self.ensemble(split)
        known = (name for name, job in self.opened.jobs.items() if job.is_floor and name not in lost)
        floors = [self.prediction(name, split) for name in known]
        facts: dict[str, Any] | None = None
        if summed.facts is not None:
            facts = {"kind": "comparison", "ensemble": summed.key, "split": split}
            facts |= {"seed": plan.seed, "views": self.views, "combine": plan.ensemble.combine}
            facts = _of_members(facts, floors, "floors") if floors else facts
        place, needs = f"{plan.name}/comparison", {"ensemble": (summed,), "floors": tuple(floors)}
        make = making.compare
        return self._add(Target("comparison", "comparison", facts, place, make, needs, goal=True, latest=True))

    def _predict(self, weights: Target, of: Chosen | None, split: str) -> Target:
        """Probabilities of the images of a split, by a training or a chosen checkpoint; ``of``: None before it is
        there."""
        job, facts, place, views = weights.owner, None, None, self.views
        fingerprint, count = self.catalogue.fingerprint, len(getattr(self.catalogue, split))
        if of is not None:
            facts = {"job": job.name, "key": of.key, "weights": of.sha256, "split": split, "views": views}
            facts |= {"catalogue": fingerprint}
            store = f"{of.sha256[:16]}-{split}" + ("" if views == "ten_crop" else f"-{views}")
            place = f"{job_place(job.name, of.key)}/probabilities/{store}"
            if of.key != job.key:  # the same weights may have predicted the images of another catalogue
                there = commit.read(self.opened.places.storage / place) or {}
                place += "" if there.get("catalogue") == fingerprint else f"-{fingerprint[:8]}"
        name, needs, cost = f"{weights.name} {split}", {"weights": (weights,)}, Cost(job, seen=count, views=views)
        sizes = powers_of_two(shards(count, self.catalogue.num_classes))
        return self._add(Target("prediction", name, facts, place, making.predict, needs, cost, self.rank, sizes, job))

    def _add(self, target: Target) -> Target:
        return self.found.setdefault(target.name, target)


def _of_members(facts: dict[str, Any], predictions: Iterable[Target], role: str = "members") -> dict[str, Any] | None:
    """The facts with those of each member; None while one is not known."""
    of = {prediction.owner.name: prediction.facts for prediction in predictions}
    return facts | {role: {name: dict(own) for name, own in of.items() if own}} if all(of.values()) else None
