"""Why a job would be trained: what differs from the state of it that was trained last."""

from collections.abc import Iterator, Mapping
from typing import Any

from aliprod.build.costs import epoch_of
from aliprod.errors import listing
from aliprod.plan.open import Opened
from aliprod.store import commit
from aliprod.store.layout import WEIGHTS, newest_step


def because(opened: Opened, name: str) -> list[str]:
    """Reasons of a job that is not finished, the settings that differ first, old and new; none where it has no key."""
    job = opened.jobs[name]
    if job.key is None:
        return []
    if (step := newest_step(opened.job_folder(name))) is not None:
        epoch = step // max(1, epoch_of(job.stage, opened.read_catalogue()).steps) + 1
        where = f"from epoch {epoch}" if epoch <= job.stage.epochs else "with the scoring of its last epoch"
        return [f"goes on {where}, step {step:,}"]
    before = _trained_last(opened, name)
    if before is None:
        return ["new"]
    network, stage = before.get("network", job.network), before.get("stage", {})
    differing = sorted(_differing(stage, job.stage.model_dump(mode="json"), f"stages.{job.stage_name}"))
    differing += _differing(network, job.network, f"backbones.{job.backbone}")
    anew = [parent for parent in job.parents if opened.record(parent) is None]
    if anew:
        differing.append(f"{listing(anew)} {'are' if len(anew) > 1 else 'is'} trained anew")
    return differing or ["other photographs, weights that it starts from, or a later version of aliprod"]


def _trained_last(opened: Opened, name: str) -> dict[str, Any] | None:
    """The record of the weights of this job that were committed last, under any key."""
    folders = opened.job_folder(name).parent.glob(f"*/{WEIGHTS}")
    dated = sorted((folder.stat().st_mtime, folder) for folder in folders)
    return next((record for _, folder in reversed(dated) if (record := commit.read(folder)) is not None), None)


def _differing(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """Settings that both have and that are not the same, each ``key old -> new``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in old.keys() & new.keys():
            yield from _differing(old[key], new[key], f"{at}.{key}".strip("."))
    elif old != new:
        yield f"{at} {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
