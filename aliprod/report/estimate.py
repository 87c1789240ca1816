"""What `aliprod plan` tells: why a job would be trained, and the forecast for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.filesize import decimal as size

from aliprod.build.costs import epoch_of
from aliprod.errors import listing
from aliprod.plan.open import Opened
from aliprod.store import commit
from aliprod.store.layout import WEIGHTS, newest_step

HEADER = ["takes", "from", "to", "ranks", "images/s", "seen in"]


def takes(found: Mapping[str, float | None] | None, on_gpus: bool) -> str:
    """What a plan takes, as far as it is known; '' where nothing is to be made."""
    kept, resume, cache, hours = found.values() if found else (None,) * 4
    if not kept:
        return ""
    more = f", and {size(int(resume))} more while a job trains" if resume else ""
    parts = [f"It takes up to {size(int(kept))} of the storage folder{more}"]
    parts += [f"{size(int(cache))} on the own disk of each machine"] if cache else []
    parts += [f"{hours:,.2f} {'GPU' if on_gpus else 'rank'}-hours"] if hours else []
    return f"{'; '.join(parts)}."


def cells(job: Mapping[str, Any]) -> list[object]:
    """Of a job, below `HEADER`; empty where it is finished."""
    if job["seconds"] == 0 and job["source"] is None:
        return [""] * len(HEADER)
    times = ["" if job[name] is None else duration(job[name]) for name in ("seconds", "begin", "end")]
    ranks = ", then ".join(map(str, job["ranks"]))
    return [*times, ranks, job["images_per_second"], job["source"] or "not measured"]


def lines(estimate: Mapping[str, Any] | None, on_gpus: bool, measure: str) -> Iterator[str]:
    """How long the plan takes. ``estimate``: None without a catalogue. ``on_gpus``: whether its jobs may run on GPUs.
    ``measure``: the command that measures what is missing."""
    if estimate is None:
        yield f"No forecast without the catalogue. Then this measures what it needs: {measure}"
        return
    if missing := estimate["missing"]:
        yield f"No forecast: nobody has measured {listing(missing, 4)}. This does: {measure}"
        if any(name.endswith(" hashes") for name in missing):
            yield "Hashes of the pictures are the exception: `run` makes them, once, and no figure is there before."
        return
    unit = "GPU" if on_gpus else "rank"
    seconds, bound = estimate["seconds"], estimate["lower_bound_seconds"]
    yield (
        f"On {estimate['gpus']} {unit}s: {duration(seconds)}, {estimate['gpu_hours']:,.2f} {unit}-hours, "
        f"{duration(estimate['prediction_seconds'])} of them predictions; "
        f"no order of the jobs takes less than {duration(bound)}."
    )
    if on_gpus and "cpu" in estimate["devices"]:
        yield "Rates were seen on a CPU; a GPU's are others. Measure on one, or say use_gpu = false in [cluster]."


def duration(seconds: float) -> str:
    """In the two largest units that matter: ``3 d 4 h``, ``2 h 05 min``, ``1 min 30 s``, ``12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def because(opened: Opened, name: str) -> list[str]:
    """Reasons of a job that is not finished, the settings that differ first, old and new; none where it has no key."""
    job = opened.jobs[name]
    if job.key is None:
        return []
    if (step := newest_step(opened.job_folder(name))) is not None:
        epoch = step // max(1, epoch_of(job.stage, opened.read_catalogue()).steps) + 1
        where = f"from epoch {epoch}" if epoch <= job.stage.epochs else "with the scoring of its last epoch"
        return [f"goes on {where}, step {step:,}"]
    dated = sorted((folder.stat().st_mtime, folder) for folder in opened.job_folder(name).parent.glob(f"*/{WEIGHTS}"))
    records = (commit.read(folder) for _, folder in reversed(dated))  # under any key, what was committed last first
    if (before := next((record for record in records if record is not None), None)) is None:
        return ["new"]
    network, stage = before.get("network", job.network), before.get("stage", {})
    differing = sorted(_differing(stage, job.stage.model_dump(mode="json"), f"stages.{job.stage_name}"))
    differing += _differing(network, job.network, f"backbones.{job.backbone}")
    anew = [parent for parent in job.parents if opened.record(parent) is None]
    if anew:
        differing.append(f"{listing(anew)} {'are' if len(anew) > 1 else 'is'} trained anew")
    return differing or ["other photographs, weights that it starts from, or a later version of aliprod"]


def _differing(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """Settings that both have and that are not the same, each ``key old -> new``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in old.keys() & new.keys():
            yield from _differing(old[key], new[key], f"{at}.{key}".strip("."))
    elif old != new:
        before, after = ("none" if value is None else value for value in (old, new))
        yield f"{at} {before} -> {after}"
