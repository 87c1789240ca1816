"""Lines and tables for a terminal."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from aliprod.build.events import DONE, Began, Changed, Event, Reported, Said, Standing, Task
from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened
from aliprod.recipe import VIEWS
from aliprod.report.estimate import duration
from aliprod.shown import escaped
from aliprod.store import epochs, mirror


def line(event: Event) -> str:
    """One line for an event; '' for one that says nothing to a person."""
    match event:
        case Began():
            text = _begun(event.opened)
        case Said():
            text = event.text
        case Reported():
            text = f"{event.job:<26} epoch {event.line['epoch'] + 1}: {_numbers(event.line)}"
        case Changed():
            text = f"{event.job:<26} {event.state.replace('_', ' ')}{_after(event)}"
        case Task():
            ended = "begins" if event.until is None else f"ended after {duration(event.until - event.since)}"
            text = f"{event.name:<26} {event.kind.replace('_', ' ')} {ended}"
        case _:
            return ""
    return stamped(text)


def stamped(text: str) -> str:
    """A line behind the time of day."""
    return f"{time.strftime('%H:%M:%S')}  {text}"


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Rows in aligned columns, numbers to the right."""
    columns = []
    for name, *values in zip(header, *rows, strict=True):
        texts = [name, *(escaped(_cell(value)) for value in values)]
        width = max(map(len, texts))
        align = ">" if any(isinstance(value, int | float) for value in values) else "<"
        columns.append([f"{text:{align}{width}}" for text in [name, "-" * width, *texts[1:]]])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def states(opened: Opened, standing: Standing, left: Mapping[str, float]) -> list[dict[str, Any]]:
    """What `aliprod status --json` says of each job. ``standing``: `aliprod.build.state.told`. ``left``: seconds to a
    job's end, where that is known."""
    sizes = {task.name: task.world_size for task in standing.tasks}
    found = {name: state(opened, name, standing) | {"world_size": sizes.get(name)} for name in opened.jobs}
    for name, row in found.items():
        row |= {"eta_seconds": 0.0 if row["state"] in DONE else left.get(name), "gain": _gain(opened.jobs[name], found)}
    return list(found.values())


def tasks(standing: Standing, now: float) -> list[dict[str, Any]]:
    """What `aliprod status --json` says of each task that is being made and is no training."""
    return [
        {"name": task.name, "kind": task.kind, "job": task.job, "seconds": now - task.since}
        for task in standing.running
        if task.kind != "training"
    ]


def states_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of `states`."""
    header = ["job", "state", "ranks", "epoch", "top-1 error on val, %", "change, points", "images/s", "left", "note"]
    shown = [
        [
            row["name"],
            row["state"].replace("_", " "),
            row["world_size"] if row["state"] == "running" else None,
            f"{row['epoch']}/{row['epochs']}",
            _percent(row["top1_error"]),
            points(row["gain"]).rjust(6),
            row["images_per_second"],
            duration(row["eta_seconds"]) if row["eta_seconds"] else "",
            _note(row),
        ]
        for row in rows
    ]
    return table(shown, header)


def _note(row: Mapping[str, Any]) -> str:
    if row["reason"] and row["state"] != "failed":
        return str(row["reason"])
    return ", ".join(filter(None, [epochs.KINDS.get(row["kind"]), "the floor" if row["floor"] else ""]))


def text(found: Mapping[str, Any]) -> str:
    """What `aliprod status --json` says, for people."""
    tasks = [f"{one['name']}: {one['kind'].replace('_', ' ')} for {duration(one['seconds'])}" for one in found["tasks"]]
    left = [] if found["eta_seconds"] is None else [f"About {duration(found['eta_seconds'])} left."]
    lost = (row for row in found["jobs"] if row["state"] == "failed" and row["reason"])
    failed = [f"{row['name']} failed: {row['reason']}" for row in lost]
    return "\n".join([states_table(found["jobs"]), *failed, *tasks, *left])


def summary(outcome: Mapping[str, Any]) -> str:
    """What a run did, and the errors and files of its ensemble where there is one."""
    counts = ", ".join(f"{name} {len(outcome[name])}" for name in ("trained", "reused", "failed"))
    lines = [f"{counts.capitalize()}."]
    if ensemble := outcome["ensemble"]:
        submission = ensemble["submission"] or "none, as there are no test images"
        lines += [outcome_table(outcome), *headline(ensemble)]
        lines += [f"Submission: {submission}", f"Probabilities: {ensemble['probabilities']}"]
    return "\n".join(lines)


def headline(ensemble: Mapping[str, Any]) -> list[str]:
    """What an ensemble is worth, in sentences: against its best member, the plain sum, and fewer members."""
    if not (found := ensemble.get("comparison")):
        return []
    best, count, combine = found["best"], len(found["members"]), found["combine"]
    own, smallest = found["members"][best["member"]], found["smallest"]
    on, by = f"{found['split']}, {VIEWS[found['views']]}", f"{best['split']}, {VIEWS[best['views']]}"
    kept = smallest["members"]
    left = [name for name in found["members"] if name not in kept]
    whole = f"The ensemble of {count}: top-1 error {interval(found['ensemble'])} on {on}, {found['images']:,} images"
    fewer = "No fewer members come within one standard error of the whole."
    if left:
        near = f"within one standard error ({100 * smallest['standard_error']:.2f} points) of the whole"
        which = f"Without {', '.join(left)}" if len(left) <= len(kept) else f"With {', '.join(kept)} alone"
        fewer = f"{which}: {interval(smallest)} cross-fitted, {near}; {len(left)} of {count} predictions fewer."
    lines = [f"{whole}; its best member, {best['member']} by {by}, {interval(own)}. Gain: {gain(own)}.", fewer]
    if floors := found.get("floors"):
        name, floor = min(floors.items(), key=lambda one: one[1]["top1_error"])
        lines.insert(1, f"The floor, frozen features ({name}): {interval(floor)}. Gain: {gain(floor)}.")
    if combine != "sum":
        how = "each image by what was fitted without it" if found["split"] == "val" else "fitted on val"
        lines.insert(1, f"The plain sum: {interval(found['sum'])}. Gain of {combine}, {how}: {gain(found['sum'])}.")
    return lines


def interval(told: Mapping[str, Any]) -> str:
    """An error with its interval of 95 %, per cent."""
    low, high = told["interval"]
    return f"{told['top1_error']:.2%} ({100 * low:.2f} to {100 * high:.2f})"


def gain(told: Mapping[str, Any] | None) -> str:
    """By how much an ensemble's error is lower than another's, with the interval of 95 % of paired draws."""
    if told is None:
        return ""
    low, high = told["gain_interval"]
    return f"{points(told['gain'])} points ({points(low)} to {points(high)})"


def outcome_table(outcome: Mapping[str, Any]) -> str:
    """The error of each member, the best first, and of the ensemble, per cent."""
    ensemble = outcome["ensemble"]
    rows = [[name, _percent(one["top1_error"]), one["version"]] for name, one in ensemble["members"].items()]
    rows.sort(key=lambda row: row[1] or 0.0)
    rows.append(["ensemble", _percent(ensemble["top1_error"]), None])
    on = ensemble["split"] or "nothing labelled"
    if compared := ensemble.get("comparison"):
        on += f", {VIEWS[compared['views']]}"
        floors = compared.get("floors", {})
        rows += [[f"{name} (floor)", _percent(one["top1_error"]), None] for name, one in floors.items()]
    return table(rows, ["member", f"top-1 error on {on}, %", "version"])


def state(opened: Opened, name: str, standing: Standing) -> dict[str, Any]:
    """What `states` says of a job, but for what others of the run have to do with it."""
    job, record, lines = opened.jobs[name], opened.record(name), opened.metrics(name)
    last: Mapping[str, Any] = lines[-1] if lines else {}
    pace = None if record or job.key is None else epochs.pace(opened.job_folder(name))
    error, kind = (record["top1_error"], record.get("kind", "raw")) if record else epochs.error(last)
    return {
        "name": job.name,
        "key": job.key,
        "state": standing.states[name],
        "reason": standing.reasons.get(name),
        "epoch": len(lines),
        "epochs": job.stage.epochs,
        "floor": job.is_floor,
        "top1_error": error,
        "kind": None if error is None else kind,
        "images_per_second": (pace or {}).get("images_per_second", last.get("speed/images_per_second")),
    }


def _gain(job: Job, states: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Top-1 error less that of the job whose weights it starts from, in -1 to 1; None while either has not ended."""
    if job.start is None:
        return None
    both = states[job.name], states[job.start]
    own, before = (row["top1_error"] if row["state"] in DONE else None for row in both)
    return None if own is None or before is None else own - before


def _begun(opened: Opened) -> str:
    plan, count = opened.plan, len(opened.jobs)
    done = sum(opened.record(name) is not None for name in opened.jobs)
    jobs = f"{count} jobs, {f'{done} finished before, {count - done}' if done else 'all'} to train"
    images = f"{len(opened.read_catalogue().train):,} training images"
    return f"{jobs}; {len(plan.ensemble.members)} members; {images}. Results: {mirror.shown(opened.folder)}"


def _after(event: Changed) -> str:
    """What follows the state in an event's line."""
    if event.state == "running":
        return f" on {event.world_size} ranks" if event.world_size > 1 else ""
    if event.state not in DONE:
        return f": {event.detail}" if event.detail else ""
    seconds = "" if event.seconds is None else f" after {duration(event.seconds)}"
    if (error := event.record.get("top1_error")) is None:
        return seconds
    scored = _of_kind(error, event.record.get("kind", "raw"))
    return f"{seconds}, top-1 error {scored} of epoch {event.record['best_epoch'] + 1}"


def _numbers(line: Mapping[str, Any]) -> str:
    (error, kind), speed = epochs.error(line), line.get("speed/images_per_second", 0.0)
    scored = "" if error is None else f"top-1 error {_of_kind(error, kind)}, "
    return f"loss {line.get('train/loss', float('nan')):.4f}, {scored}{speed:.0f} images/s"


def _of_kind(error: float, kind: str) -> str:
    return f"{error:.2%} ({words})" if (words := epochs.KINDS.get(kind)) else f"{error:.2%}"


def points(share: float | None) -> str:
    """Per cent points with their sign, never -0.00; '' where they are not known."""
    return "" if share is None else f"{round(100 * share, 2) + 0.0:+.2f}"


def _percent(error: float | None) -> float | None:
    return None if error is None else round(100 * error, 2)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)
