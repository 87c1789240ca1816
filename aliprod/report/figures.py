"""Figures as SVG, 360 units wide like a phone, so that text is read at its own size; the page has their colours.

And the course of a run, which one of them shows.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from markupsafe import Markup

from aliprod.build.events import Standing, Task
from aliprod.forecast.simulate import Span
from aliprod.plan.jobs import Job
from aliprod.report.error_analysis import Bin, Size
from aliprod.report.estimate import duration

WIDTH = 360
_LEFT, _RIGHT = 150, WIDTH - 8  # of a plot beside names
_NAME = 24  # letters of a name that have room there
_TICKS = 5
_ROWS = 60  # of the course
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


class Course(NamedTuple):
    """The spans of each target, in seconds of work: time in which nothing of the plan was made is left out. ``fact``:
    in the order in which they began. ``forecast``: of the whole plan, as it was kept; {} where there was none. ``now``:
    where what runs stands; None while nothing runs."""

    fact: Mapping[str, Sequence[Span]]
    forecast: Mapping[str, Sequence[Span]]
    now: float | None


def end(spans: Mapping[str, Sequence[Span]]) -> float:
    """Of the last span."""
    return max((span.end for one in spans.values() for span in one), default=0.0)


def course(standing: Standing, forecast: Mapping[str, Sequence[Span]], now: float) -> Course:
    """Lay out what a run, and the runs before it, have made; ``now`` in seconds since the epoch."""
    tasks = sorted((*standing.past, *standing.tasks), key=lambda task: task.since)
    ends = accumulate((task.until or now for task in tasks), max)
    gaps = [(task.since, task.since - end) for end, task in zip(ends, tasks[1:], strict=False) if task.since > end]

    def worked(time: float) -> float:
        return time - tasks[0].since - sum(gap for begin, gap in gaps if begin <= time)

    fact = defaultdict(list)
    for task in tasks:
        fact[task.name].append(Span(worked(task.since), worked(task.until or now), task.world_size))
    return Course(dict(fact), forecast, worked(now) if standing.running else None)


def rank_hours(tasks: Iterable[Task], now: float) -> dict[str, float]:
    """Hours of all ranks by target, of those on GPUs where there are such; every attempt counts."""
    tasks = list(tasks)
    on_gpus, hours = any(task.gpus for task in tasks), defaultdict[str, float](float)
    for task in tasks:
        ranks = task.world_size * (task.gpus if on_gpus else 1)
        hours[task.name] += ranks * ((task.until or now) - task.since) / 3600
    return dict(hours)


@dataclass(frozen=True)
class Scale:
    """Values from 0 to ``high`` along an axis from ``begin`` to ``end``."""

    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        return self.begin + (self.end - self.begin) * value / (self.high or 1.0)

    def ticks(self, least: float = 0.0) -> list[float]:
        """Round values, at most six, ``least`` or more apart."""
        rough = max(self.high / _TICKS, least, 1e-9)
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
        return [step * number for number in range(int(self.high / step + 1e-6) + 1)]


def plan_graph(jobs: Mapping[str, Job], rows: Mapping[str, tuple[str, str]]) -> Markup:
    """The jobs, each below the one that it starts from; what else a job learns from is a dashed line. ``rows``: the
    state of a job, and how long it took, "" where that is not known."""
    order = list(_below(jobs, None))
    places = {name: (10.0 + 14 * depth, 14.0 + 22 * row) for row, (name, depth) in enumerate(order)}
    parts = []
    for name, (x, y) in places.items():
        for parent in jobs[name].parents:
            px, py = places[parent]
            kind = "edge" if parent == jobs[name].start else "edge other"  # those behind the names
            path = f"M{px} {py}V{y}H{x}" if kind == "edge" else f"M222 {py}C244 {py} 244 {y} 222 {y}"
            parts.append(_tag('<path class="{}" d="{}"/>', kind, path))
    for name, (x, y) in places.items():
        state, took = rows[name]
        words = ", ".join(filter(None, [state.replace("_", " "), took]))
        member = " ★" if jobs[name].member else ""
        parts.append(_circle(x, y, 5, f"dot {state}"))
        parts += [_text(x + 10, y + 4, _short(name, 30) + member), _text(_RIGHT, y + 4, words, "e " + state)]
    return _svg(22 * len(order) + 6, parts, "The jobs of the plan and their states")


def gantt(course: Course) -> Markup:
    """What was made when, and when the forecast would have it made, what belongs to a job in its row. Something has
    begun."""
    rows = {name: name.partition(" ")[0] for name in (*course.fact, *course.forecast)}
    places = {row: 4.0 + 15 * place for place, row in enumerate(list(dict.fromkeys(rows.values()))[:_ROWS])}
    high = max(end(course.fact), end(course.forecast))
    unit, word = next(((u, w) for u, w in _UNITS if high >= 3 * u), _UNITS[-1])
    axis, below = Scale(high / unit, _LEFT, _RIGHT - 10), 15 * len(places) + 6
    parts = list(_ticks(axis, below, lambda time: f"{time:g}" if time else f"0 {word}"))
    parts += [_text(_LEFT - 6, y + 9, _short(row, _NAME), "e small") for row, y in places.items()]
    for spans, kind, height in ((course.forecast, "forecast", 12), (course.fact, "fact", 6)):
        for name, span in ((name, span) for name, own in spans.items() if rows[name] in places for span in own):
            words = f"{name}, {kind}: {duration(span.end - span.begin)} on {span.ranks} ranks"
            left, right = axis(span.begin / unit), axis(span.end / unit)
            parts.append(
                _rect((left, places[rows[name]] + (12 - height) / 2, max(1.0, right - left), height), kind, words)
            )
    if course.now is not None:
        parts.append(_line("now", (axis(course.now / unit), 0), (axis(course.now / unit), below)))
    return _svg(below + 20, parts, "When each target was made")


def errors(rows: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any] | None]]) -> Markup:
    """Errors with their intervals, the ensemble's first; hollow and thin: on val, of the centre crop. ``rows``: name,
    ``top1_error`` and ``interval`` (0 to 1), the same on val where that is known."""
    high = max(one["interval"][1] for _, own, val in rows for one in (own, val) if one)
    axis, below, parts = Scale(100 * high, _LEFT, _RIGHT - 6), 24 * len(rows) + 4, list[Markup]()
    parts += _ticks(axis, below, lambda error: f"{error:g} %")
    whole = 100 * rows[0][1]["top1_error"]
    parts.append(_line("now", (axis(whole), 0), (axis(whole), below)))
    for row, (name, own, val) in enumerate(rows):
        y = 12.0 + 24 * row
        parts.append(_text(_LEFT - 6, y + 4, _short(name, _NAME), "e small strong" if row == 0 else "e small"))
        for one, kind, at in ((own, "", y - 3 if val else y), (val, " val", y + 5)):
            if one:
                low, top = (axis(100 * end) for end in one["interval"])
                parts.append(_line(f"whisker{kind}", (low, at), (top, at)))
                error = one["top1_error"]
                parts.append(_circle(axis(100 * error), at, 3.5, f"mark{kind}", f"{name} {error:.2%}"))
    return _svg(below + 20, parts, "Errors of the ensemble and its members, with intervals")


def by_epoch(jobs: Mapping[str, Job], found: Mapping[str, Sequence[float | None]]) -> Iterator[tuple[str, Markup]]:
    """A panel for each backbone: a stage begins where the one that it starts from ended. ``found``: top-1 error of a
    job after each epoch, 0 to 1, None where val has no images."""
    drawn = {name: [100 * e for e in own if e is not None] for name, own in found.items()}
    drawn = {name: own for name, own in drawn.items() if own}
    high = max((max(own) for own in drawn.values()), default=0.0)
    for backbone in dict.fromkeys(jobs[name].backbone for name in drawn):
        own = {name: values for name, values in drawn.items() if jobs[name].backbone == backbone}
        begins = {name: _epochs_before(jobs, name) for name in own}
        across = Scale(max(begins[name] + len(values) for name, values in own.items()), 34, _RIGHT - 6)
        named = 12 * ((len(own) + 4) // 5)  # five names of stages a line
        up = Scale(high, 100 + named, 10 + named)
        parts = [*_ticks(across, 100 + named, lambda epoch: f"{epoch:g}", least=1.0), *_levels(up, 34)]
        for number, (name, values) in enumerate(own.items()):
            series = f"s{number % 6}"
            points = [(across(begins[name] + epoch), up(value)) for epoch, value in enumerate(values, 1)]
            parts.append(_line(f"curve {series}", *points))
            parts += [_circle(*point, 2.5, series) for point in points]
            place = (34 + 64 * (number % 5), 10 + 12 * (number // 5))
            parts.append(_text(*place, _short(jobs[name].stage_name, 9), f"small strong {series}"))
        yield backbone, _svg(120 + named, parts, f"Errors of {backbone} by epoch")


def by_size(sizes: Sequence[Size]) -> Markup:
    """The error of classes with few and with many training images."""
    up, width = Scale(100 * max(size.error for size in sizes) or 1.0, 130, 22), (_RIGHT - 34) / len(sizes)
    parts = list(_levels(up, 34))
    for number, size in enumerate(sizes):
        x, y = 34 + width * (number + 0.5), up(100 * size.error)
        counted = f"{size.classes} class{'' if size.classes == 1 else 'es'}"
        parts.append(_rect((x - 0.38 * width, y, 0.76 * width, 130 - y), "fact", f"{size.error:.2%}"))
        parts.append(_text(x, y - 4, f"{size.error:.1%}", "m small"))
        named = f"{size.low}" if size.low == size.high else f"{size.low}–{size.high}"
        parts += [_text(x, 144, named, "m small"), _text(x, 156, counted, "m small mute")]
    return _svg(162, parts, "Errors by training images of a class")


def reliability(bins: Sequence[Bin]) -> Markup:
    """How often the ensemble is right where it is so sure; below, how often it is so sure."""
    across, up = Scale(100.0, 40, _RIGHT - 10), Scale(100.0, 210, 10)
    parts = [*_ticks(across, 260, lambda share: f"{share:g} %"), *_levels(up, 40)]
    parts.append(_line("edge other", (across(0), up(0)), (across(100), up(100))))
    points = [(across(100 * one.sure), up(100 * one.right)) for one in bins]
    parts.append(_line("curve s0", *points))
    most = max(one.images for one in bins)
    for one, (x, y) in zip(bins, points, strict=True):
        words = f"{one.images:,} images, {one.sure:.1%} sure, {one.right:.1%} right"
        parts.append(_circle(x, y, 4, "s0", words))
        height = max(1.0, 36 * one.images / most)
        parts.append(_rect((x - 9, 260 - height, 18, height), "forecast", words))
    return _svg(278, parts, "Share of right predictions by how sure they are")


def disagreement(names: Sequence[str], shares: Sequence[Sequence[float]]) -> Markup:
    """Of each two members, the share of images that they predict differently, per cent, darker where more."""
    side = (_RIGHT - _LEFT) / len(names)
    high, parts = max(max(row) for row in shares) or 1.0, list[Markup]()
    for row, name in enumerate(names):
        y = 16 + side * row
        label = _short(name, _NAME - 3) + f" {row + 1}"
        parts += [_text(_LEFT - 6, y + side / 2 + 4, label, "e small")]
        parts += [_text(_LEFT + side * (row + 0.5), 11, str(row + 1), "m small mute")]
        for column, share in enumerate(shares[row][: row + 1]):
            box = (_LEFT + side * column, y, side - 1, side - 1)
            parts.append(_rect(box, "cell", f"{name}, {names[column]}: {share:.1%}", share / high))
            if side > 14 and column < row:
                middle = (box[0] + side / 2, y + side / 2 + 3.5)
                parts.append(_text(*middle, f"{100 * share:.0f}", f"m small{' on' if share > 0.55 * high else ''}"))
    return _svg(20 + side * len(names), parts, "How often two members disagree")


def _below(jobs: Mapping[str, Job], parent: str | None, depth: int = 0) -> Iterator[tuple[str, int]]:
    """The jobs that start from one, each before those that start from it; with how many are above."""
    for name, job in jobs.items():
        if job.start == parent:
            yield name, depth
            yield from _below(jobs, name, depth + 1)


def _epochs_before(jobs: Mapping[str, Job], name: str) -> int:
    start = jobs[name].start
    return 0 if start is None else _epochs_before(jobs, start) + jobs[start].stage.epochs


def _ticks(axis: Scale, below: float, named: Callable[[float], str], least: float = 0.0) -> Iterator[Markup]:
    """Lines across a plot, and what they stand for below it."""
    for tick in axis.ticks(least):
        yield _line("grid", (axis(tick), 4), (axis(tick), below))
        yield _text(axis(tick), below + 14, named(tick), "m small mute")


def _levels(axis: Scale, left: float) -> Iterator[Markup]:
    """The same for an axis that points upwards, in per cent."""
    for tick in axis.ticks():
        yield _line("grid", (left, axis(tick)), (_RIGHT, axis(tick)))
        yield _text(left - 5, axis(tick) + 4, f"{tick:g}", "e small mute")


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _tag(template: str, *values: object) -> Markup:
    return Markup(template).format(*values)  # noqa: S704 - templates are ours, values are escaped


def _text(x: float, y: float, words: str, kind: str = "") -> Markup:
    return _tag('<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>', x, y, kind, words)


def _line(kind: str, *points: tuple[float, float]) -> Markup:
    return _tag('<path class="{}" d="M{}"/>', kind, "L".join(f"{x:.1f} {y:.1f}" for x, y in points))


def _circle(x: float, y: float, radius: float, kind: str, title: str = "") -> Markup:
    circle = '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>'
    return _tag(circle, kind, x, y, radius, title)


def _rect(box: tuple[float, float, float, float], kind: str, title: str, opacity: float = 1.0) -> Markup:
    rect = '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.2f}">'
    return _tag(rect + "<title>{}</title></rect>", kind, *box, opacity, title)


def _svg(height: float, parts: Sequence[Markup], label: str) -> Markup:
    svg = '<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>'
    return _tag(svg, WIDTH, height, label, Markup("").join(parts))
