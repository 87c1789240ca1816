"""The report of a plan: one HTML file that needs nothing else, without a script, to be mailed or put on a server."""

import base64
import io
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from aliprod.build.events import Standing
from aliprod.build.state import told
from aliprod.catalogue.catalogue import Catalogue, Images
from aliprod.catalogue.decode import Unreadable, decode_anyway
from aliprod.errors import AliprodError
from aliprod.forecast.rates import Estimates, scaled
from aliprod.forecast.simulate import kept
from aliprod.plan.open import Opened, Request, open_plan
from aliprod.recipe import VIEWS
from aliprod.report import error_analysis, figures, status
from aliprod.report.error_analysis import look_alikes, reliability
from aliprod.report.estimate import duration
from aliprod.report.figures import course, end, rank_hours
from aliprod.shown import lines, redacted
from aliprod.store import commit, epochs, lineage

FILE = "report.html"
_CONFUSIONS, _MISTAKES, _PAIRS = 12, 12, 6
_THUMBNAIL = 120  # pixels


def write(request: Request) -> Path:
    """Write STORAGE/PLAN/report.html from what is in the storage folder, whatever of it there is. Refused: what is
    there is no catalogue. StorageFull: no room."""
    path = request.places.of(request.plan) / FILE
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("aliprod.report", "."),
        autoescape=True,
        finalize=lambda value: lines(value) if type(value) is str else value,  # not what is HTML already
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "points": status.points, "duration": duration}
    environment.filters |= {"interval": status.interval, "gain": status.gain}
    commit.write_file(path, environment.get_template("page.html").render(_facts(request)))
    return path


def _facts(request: Request) -> dict[str, Any]:
    plan, opened = request.plan, open_plan(request)
    lines = {name: opened.metrics(name) for name in opened.jobs}
    result, standing = commit.read_json(opened.folder / "result.json").get("ensemble") or {}, told(opened)
    found = {name: [epochs.error(line)[0] for line in own] for name, own in lines.items()}
    rows = [row | {"last": (lines[row["name"]] or [{}])[-1]} for row in status.states(opened, standing, {})]
    return {
        "plan": plan,
        "note": opened.note,
        "tracked": standing.page.partition(" "),  # an address and, where no server runs, how to open it
        "settings": plan.model_dump_json(indent=1, exclude={"cluster"}, exclude_defaults=True),  # no password of MLflow
        "rows": rows,
        "ensemble": result,
        "headline": status.headline(result),
        "views": VIEWS,
        "saved": _saved(opened, result),
        "curves": list(figures.by_epoch(opened.jobs, found)),
        "analysis": _analysis(opened, result),
        **_times(opened, standing, rows),
        **_compared(opened, rows, result.get("comparison")),
        **_origin(opened),
    }


def _times(opened: Opened, standing: Standing, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """When what was made, what that cost, and the plan's graph with both."""
    now, tasks, forecast = time.time(), (*standing.past, *standing.tasks), kept(opened)
    found, hours = course(standing, forecast.spans if forecast else {}, now), rank_hours(tasks, now)
    took = {name: duration(sum(span.end - span.begin for span in spans)) for name, spans in found.fact.items()}
    states = {row["name"]: (row["state"], took.get(row["name"], "")) for row in rows}
    kinds = {kind: {task.name for task in tasks if task.kind == kind} for kind in dict.fromkeys(t.kind for t in tasks)}
    ended = max((task.until for task in tasks if task.until), default=0.0)
    return {
        "graph": figures.plan_graph(opened.jobs, states),
        "gantt": figures.gantt(found) if found.fact else "",
        "course": found,
        "lasts": end(found.fact),
        "expected": end(found.forecast),
        "forecast_on": _day(forecast.time) if forecast else "",
        "took": took,
        "hours": hours,
        "unit": "GPU" if any(task.gpus for task in tasks) else "rank",
        "kinds": [(kind, len(names), sum(hours[name] for name in names)) for kind, names in kinds.items()],
        "nodes": len(standing.nodes),
        "date": _day(ended) if ended else "",
    }


def _compared(opened: Opened, rows: Iterable[Mapping[str, Any]], found: Mapping[str, Any] | None) -> dict[str, Any]:
    """The members' errors, with those on val beside them, and where two of them disagree."""
    if not found:
        return {"compared": None}
    images = len(opened.catalogue.val) if opened.catalogue else 0
    on_val = {
        row["name"]: {"top1_error": row["top1_error"], "interval": _wilson(row["top1_error"], images)}
        for row in rows
        if images and row["name"] in found["members"] and row["top1_error"] is not None
    }
    members = sorted(found["members"].items(), key=lambda one: one[1]["top1_error"])
    shares, floors = found.get("disagreement"), found.get("floors", {})  # older runs have not counted them
    shown = [(n, m, on_val.get(n)) for n, m in members] + [(f"floor: {n}", one, None) for n, one in floors.items()]
    return {
        "compared": found,
        "members": members,
        "on_val": on_val,
        "floors": floors,
        "errors": figures.errors([("ensemble", found["ensemble"], None), *shown]),
        "disagreement": figures.disagreement(list(found["members"]), shares) if shares and len(members) > 2 else "",
        "apart": shares[1][0] if shares and len(members) == 2 else None,
    }


def _wilson(error: float, images: int) -> tuple[float, float]:
    """An interval of 95 % for a share of so many images (Wilson 1927); of a mean over classes it is about right."""
    z = 1.96 / math.sqrt(images)
    middle, half = error + z * z / 2, z * math.sqrt(error * (1 - error) + z * z / 4)
    return (middle - half) / (1 + z * z), (middle + half) / (1 + z * z)


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


def _origin(opened: Opened) -> dict[str, Any]:
    """What the ensemble was made of, by which software, and where MLflow has it."""
    address = redacted(opened.places.tracking_uri).rstrip("/")
    records = [record for name in opened.jobs if (record := opened.record(name))]
    environments = {json.dumps(record.get("environment", {}), sort_keys=True) for record in records}
    return {
        "choices": commit.read_json(opened.folder / lineage.MEMBERS),
        "mlflow": address if address.startswith(("http://", "https://")) else "",
        "environments": [json.loads(one) for one in sorted(environments)],
        "software": lineage.software(),
        "digest": opened.plan.digest,
        "fingerprint": opened.catalogue.fingerprint if opened.catalogue else "",
    }


def _analysis(opened: Opened, result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Mistakes with pictures, and how errors depend on sureness and class size, on the images that are scored."""
    catalogue = opened.catalogue
    if catalogue is None or not result or result["split"] is None:
        return None
    if (found := error_analysis.of_plan(opened.folder, catalogue, result["split"])) is None:
        return None
    shown, suspects, (bins, calibration) = _Pictures(found, catalogue), found.suspects(), reliability(found)
    sizes = error_analysis.by_size(found, catalogue.class_counts)
    pairs, looked = look_alikes(catalogue, found.images.take(found.rows), opened.places.storage)
    return {
        "images": len(found.rows),
        "confusions": [shown.confusion(one) for one in error_analysis.confusions(found, _CONFUSIONS)],
        "mistakes": [shown.scored(place) | {"suspect": suspects[place]} for place in found.mistakes()[:_MISTAKES]],
        "suspects": int(suspects.sum()),
        "by_size": figures.by_size(sizes) if len(sizes) > 1 else "",
        "reliability": figures.reliability(bins),
        "calibration": calibration,
        "pairs": [(pair.bits, shown.scored(pair.row), shown.trained(pair.twin)) for pair in pairs[:_PAIRS]],
        "alike": len(pairs),
        "looked": looked,
    }


@dataclass(frozen=True)
class _Pictures:
    """Pictures of what was found, with what is said of them."""

    found: error_analysis.Scored
    catalogue: Catalogue

    @cached_property
    def twice(self) -> frozenset[str]:
        """Names of more than one class."""
        return frozenset(name for name, count in Counter(self.catalogue.names).items() if name and count > 1)

    def scored(self, place: int) -> dict[str, Any]:
        """An image with its label and what it was taken for."""
        found, row = self.found, int(self.found.rows[place])
        classes = {"name": self._name(found.truth[place]), "predicted": self._name(found.predicted[place])}
        shares = {"own": found.own[place], "sure": found.sure[place]}
        return {"id": found.images.ids[row].as_py(), "picture": _thumbnail(found.images, row), **classes, **shares}

    def trained(self, row: int) -> dict[str, Any]:
        """A training image."""
        train = self.catalogue.train
        of, count = self._name(train.labels[row]), int((train.labels == train.labels[row]).sum())
        return {"id": train.ids[row].as_py(), "picture": _thumbnail(train, row), "name": of, "images": count}

    def confusion(self, one: error_analysis.Confusion) -> dict[str, Any]:
        """The surest of its images, and the first training image of either class."""
        labels = self.catalogue.train.labels
        classes = [self.trained(int((labels == label).argmax())) for label in (one.truth, one.predicted)]
        return {"count": one.count, "of": one.of, "wrong": self.scored(one.place), "classes": classes}

    def _name(self, label: int) -> str:
        """A class by its name, and by its number where another has that name too."""
        number, name = str(self.catalogue.classes[label]), self.catalogue.names[label]
        return f"{name} ({number})" if name in self.twice else name or number


def _thumbnail(images: Images, row: int) -> Markup:
    """The address of a JPEG of at most 120 pixels a side, which holds it, as it is: letters of base64 may look like a
    token, which is not shown. Grey where the picture cannot be read."""
    try:
        source = images.source(row)
    except (Unreadable, AliprodError):
        source = b""
    image, _ = decode_anyway(source)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return Markup("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())  # noqa: S704


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"
