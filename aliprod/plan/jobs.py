"""The jobs of a plan: who starts from whom, and under which key each result is kept.

A key is the sha256 of all that the plan says about a result. Where a job runs is no part of it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aliprod.errors import Refused
from aliprod.plan.schema import EDGES, Edge, Plan
from aliprod.recipe import ADDED, ADDED_BELOW, RECIPE_VERSION, Stage
from aliprod.recipe.options import needs
from aliprod.store.commit import sha256
from aliprod.store.layout import key_of

# Networks that pool as all did before a backbone's own pooling was kept: their keys stay.
_MEAN_POOLED = re.compile(
    r"((wide_|se|legacy_se|test_)?res(net|next)|(tf_|test_)?efficientnet|legacy_senet|regnet|densenet)(?!.*(clip|mlp))"
)


@dataclass(frozen=True)
class Job:
    """One stage of one backbone."""

    name: str  # "resnet50/dcl"
    backbone: str
    network: str  # timm's name of the backbone
    stage_name: str
    stage: Stage  # effective; a pretrained path names the file itself
    parents: tuple[str, ...]  # names of all jobs that must be finished before
    start: str | None  # the one whose weights it starts from
    soup: tuple[str, ...]  # those whose weights it is the mean of
    labellers: tuple[str, ...]  # those whose predictions of test images it trains on
    member: bool
    facts: Mapping[str, Any] | None  # all that the key hashes; None without a catalogue

    @property
    def key(self) -> str | None:
        """sha256 of the facts, in hexadecimal."""
        return None if self.facts is None else key_of(self.facts)

    @property
    def is_floor(self) -> bool:
        """Whether it shows what pretrained features are worth by themselves, which the ensemble is to beat."""
        return self.stage.features == "cached" and self.start is None and not self.member


def jobs_of(plan: Plan, fingerprint: str | None, tree: str = "") -> dict[str, Job]:
    """All jobs by name, parents before their children. ``fingerprint``: of the catalogue, class list included; None
    where it is not there: the jobs have no keys then. ``tree``: of its product tree, part of the keys of those jobs
    whose objective needs it. Refused: pretrained weights that are asked for are not there."""
    found, left = dict[str, Job](), {name: plan.parents(name) for name in plan.job_names()}
    while left:  # in the plan's order, but for those that must wait for a later one
        name = next(name for name, parents in left.items() if left.keys().isdisjoint(parents))
        del left[name]
        found[name] = _job(plan, name, found, fingerprint, tree)
    return found


def _job(plan: Plan, name: str, before: Mapping[str, Job], fingerprint: str | None, tree: str) -> Job:
    backbone, _, stage_name = name.partition("/")
    network, edges = plan.backbones[backbone], plan.edges(name)
    stage = plan.stage(name)
    if isinstance(stage.pretrained, str) and not stage.pretrained.endswith(".safetensors"):  # a file of each network
        stage = stage.model_copy(update={"pretrained": str(Path(stage.pretrained) / f"{network}.safetensors")})
    start, soup, _, labellers = (edges[edge] for edge in EDGES)
    keys = {edge: [before[parent].key for parent in names] for edge, names in edges.items()}
    facts = None
    if fingerprint is not None:
        facts = _facts(stage, network, keys, fingerprint, tree)
        if stage.shares == "ranks":
            facts["stage"]["shares"] = {"ranks": plan.cluster.ranks_of(name)[1]}
    return Job(
        name=name,
        backbone=backbone,
        network=network,
        stage_name=stage_name,
        stage=stage,
        parents=plan.parents(name),
        start=next(iter(start), None),
        soup=soup,
        labellers=labellers,
        member=name in plan.ensemble.members,
        facts=facts,
    )


def _facts(
    stage: Stage, network: str, keys: Mapping[Edge, list[str | None]], fingerprint: str, tree: str
) -> dict[str, Any]:
    """What the key hashes. The names of other jobs are no part of it, their keys are."""
    out: dict[str, Any] = {setting: set(below) or True for setting, *below in EDGES}
    out |= {name: True for name in ADDED if getattr(stage, name) == Stage.model_fields[name].default}
    for table, names in ADDED_BELOW.items():
        out[table] = {name for name in names if getattr(getattr(stage, table), name) is None}
    settings: dict[str, Any] = stage.model_dump(mode="json", exclude=out)
    if isinstance(stage.pretrained, str):
        settings["pretrained"] = {"sha256": _weights_digest(Path(stage.pretrained))}
    pooled = {} if _MEAN_POOLED.match(network) else {"pooling": "own"}
    return pooled | {
        "recipe": RECIPE_VERSION,
        "network": network,
        "stage": settings,
        "parents": {".".join(edge): of_edge for edge, of_edge in keys.items() if of_edge},
        "catalogue": fingerprint,
        "tree": tree if needs(stage.objective.name).tree else "",
    }


def _weights_digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        advice = "pretrained is true, false, a safetensors file, or a folder that holds NETWORK.safetensors."
        raise Refused(f"pretrained weights cannot be read: {error.strerror or error}.", path, advice) from None
