"""The report of a plan: one HTML file that needs nothing else, without a script, to be mailed or put on a server."""

import base64
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2

from aliprod.build.state import told
from aliprod.catalogue.catalogue import Catalogue, Images
from aliprod.catalogue.decode import Unreadable, decode_anyway
from aliprod.errors import AliprodError
from aliprod.forecast.seconds import Estimates, scaled
from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened, Request, open_plan
from aliprod.report import error_analysis, figures, status
from aliprod.report.estimate import duration
from aliprod.store import commit, epochs

FILE = "report.html"
_CONFUSIONS = 12
_THUMBNAIL = 120  # pixels


def write(request: Request) -> Path:
    """Write STORAGE/PLAN/report.html from what is in the storage folder, whatever of it there is.

    Raises:
        Refused: what is there is no catalogue. StorageFull: no room.
    """
    path = request.places.of(request.plan) / FILE
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("aliprod.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": _percent, "points": _points, "picture": _as_data}
    environment.filters |= {"interval": status.interval, "gain": status.gain}
    commit.write_file(path, environment.get_template("page.html").render(_facts(request)))
    return path


def _facts(request: Request) -> dict[str, Any]:
    plan, opened = request.plan, open_plan(request)
    lines = {name: opened.metrics(name) for name in opened.jobs}
    result = _ensemble(opened.folder / "result.json")
    errors = {name: [line.get(epochs.TOP1) for line in own] for name, own in lines.items()}
    standing = told(opened)
    return {
        "plan": plan,
        "note": opened.note,
        "tracked": standing.page.partition(" "),  # an address and, where no server runs, how to open it
        "settings": plan.model_dump_json(indent=1, exclude={"cluster"}, exclude_defaults=True),  # no password of MLflow
        "rows": [row | {"last": (lines[row["name"]] or [{}])[-1]} for row in status.states(opened, standing, {})],
        "took": {task.name: duration(task.until - task.since) for task in standing.tasks if task.until is not None},
        "ensemble": result,
        "headline": status.headline(result),
        "compared": result.get("comparison"),
        "views": status.VIEWS,
        "saved": _saved(opened, result),
        "figures": list(_figures(opened.jobs, errors, result)),
        **_error_analysis(opened.catalogue, opened.folder / "ensemble", result),
    }


def _ensemble(path: Path) -> dict[str, Any]:
    """The last run's ensemble; {} where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["ensemble"] or {})
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _figures(
    jobs: Mapping[str, Job], errors: Mapping[str, list[float | None]], result: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    if drawn := figures.by_epoch(jobs, errors):
        yield "Errors by epoch", drawn
    if result and result["top1_error"] is not None:
        known = {name: member["top1_error"] for name, member in result["members"].items()}
        known = dict(sorted(known.items(), key=lambda one: one[1]))
        yield f"Members and ensemble on {result['split']}", figures.members(known, result["top1_error"])


def _saved(opened: Opened, result: Mapping[str, Any]) -> float | None:
    """The share of the time of all predictions that the smallest ensemble does without; None where it is not known."""
    if opened.catalogue is None or not (found := result.get("comparison")):
        return None
    estimates, jobs = Estimates(opened), opened.jobs  # ten crops take each of them ten times as long
    rates = {name: estimates.predicting(jobs[name], "center") for name in found["members"] if name in jobs}
    took = {name: 1 / scaled(rate, 1) for name, rate in rates.items() if rate is not None}
    if len(took) < len(found["members"]):
        return None
    return 1 - sum(took[name] for name in found["smallest"]["members"]) / sum(took.values())


def _error_analysis(catalogue: Catalogue | None, folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Confusions with pictures and errors by class size, of the images that the ensemble's error is counted on."""
    nothing = {"confusions": [], "by_size": "", "scored": 0}
    if catalogue is None or not result or result["split"] is None:
        return nothing
    split, record = result["split"], commit.read(folder) or {}
    own = folder if record.get("split") == split else folder.with_name(f"ensemble-{split}")
    try:
        found = error_analysis.scored(own, catalogue, split)
    except AliprodError:  # removed by hand: the rest can still be shown
        return nothing
    confusions = error_analysis.confusions(found, _CONFUSIONS)
    sizes = error_analysis.by_size(found, catalogue.class_counts)
    return {
        "confusions": [_pictured(confusion, found, catalogue) for confusion in confusions],
        "by_size": figures.by_size(sizes) if sizes else "",
        "scored": len(found.rows),
    }


def _pictured(
    confusion: error_analysis.Confusion, found: error_analysis.Scored, catalogue: Catalogue
) -> dict[str, Any]:
    return {
        "count": confusion.count,
        "of": confusion.of,
        "id": found.images.ids[confusion.row].as_py(),
        "wrong": _thumbnail(found.images, confusion.row),
        "classes": [_class(catalogue, confusion.truth), _class(catalogue, confusion.predicted)],
    }


def _class(catalogue: Catalogue, row: int) -> dict[str, Any]:
    """A class with its first training image."""
    return {
        "name": f"{catalogue.classes[row]} {catalogue.names[row]}".strip(),
        "images": int(catalogue.class_counts[row]),
        "picture": _thumbnail(catalogue.train, int((catalogue.train.labels == row).argmax())),
    }


def _thumbnail(images: Images, row: int) -> bytes:
    """JPEG of at most 120 pixels a side; grey where the picture cannot be read."""
    try:
        source = images.source(row)
    except (Unreadable, AliprodError):
        source = b""
    image, _ = decode_anyway(source)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()


def _as_data(content: bytes | str, kind: str) -> str:
    """A picture as an address that holds it."""
    coded = base64.b64encode(content.encode() if isinstance(content, str) else content).decode()
    return f"data:image/{kind};base64,{coded}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _points(gain: float | None) -> str:
    return "" if gain is None else f"{100 * gain:+.2f}"
