"""Figures as SVG: errors by epoch along each backbone's stages, members beside their ensemble, errors by class size."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from aliprod.plan.jobs import Job
from aliprod.report.error_analysis import Size

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "aliprod",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_INCHES = 3.2
_COLUMNS = 3


@rc_context(_STYLE)
def by_epoch(jobs: Mapping[str, Job], errors: Mapping[str, Sequence[float | None]]) -> str:
    """A panel for each backbone: a stage begins where the one that it starts from ended.

    Args:
        errors: job -> top-1 error after each epoch, 0 to 1, None where val has no images.
    Returns:
        SVG; "" where no epoch has an error.
    """
    drawn = {name: [e for e in found if e is not None] for name, found in errors.items()}
    drawn = {name: found for name, found in drawn.items() if found}
    backbones = list(dict.fromkeys(jobs[name].backbone for name in drawn))
    if not backbones:
        return ""
    columns = min(len(backbones), _COLUMNS)
    rows = -(-len(backbones) // columns)
    figure = Figure((_INCHES * columns, 0.8 * _INCHES * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    for backbone, panel in zip(backbones, panels, strict=False):  # in this order it takes no panel too many
        for name, found in drawn.items():
            if jobs[name].backbone == backbone:
                begin = _epochs_before(jobs, name)
                epochs = range(begin + 1, begin + 1 + len(found))
                panel.plot(epochs, [100 * error for error in found], marker=".", label=jobs[name].stage_name)
        panel.set_title(backbone)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.legend(frameon=False, fontsize=7)
    for panel in panels:
        panel.set_axis_off()
    figure.supylabel("top-1 error on val, %")
    figure.supxlabel("epochs, with those of the stages before")
    return _svg(figure)


@rc_context(_STYLE)
def members(errors: Mapping[str, float], ensemble: float) -> str:
    """The error of each member as a bar, that of the ensemble as a line; 0 to 1."""
    figure = Figure((_INCHES * 2, 0.6 + 0.25 * len(errors)), layout="constrained")
    axes: Axes = figure.subplots()
    axes.barh(list(errors), [100 * error for error in errors.values()], color="#9db7d5")
    axes.axvline(100 * ensemble, color="#b3261e", label=f"ensemble, {ensemble:.2%}")
    axes.invert_yaxis()
    axes.set_xlabel("top-1 error, %")
    axes.legend(frameon=False)
    return _svg(figure)


@rc_context(_STYLE)
def by_size(sizes: Sequence[Size]) -> str:
    """The error of classes with few and with many training images."""
    figure = Figure((_INCHES * 2, 0.8 * _INCHES), layout="constrained")
    axes: Axes = figure.subplots()
    names = [f"{size.low}" if size.low == size.high else f"{size.low} to {size.high}" for size in sizes]
    bars = axes.bar(names, [100 * size.error for size in sizes], color="#9db7d5")
    axes.bar_label(bars, [f"{size.classes} class{'' if size.classes == 1 else 'es'}" for size in sizes], fontsize=7)
    axes.set_ylabel("top-1 error, %")
    axes.set_xlabel("training images of the class")
    return _svg(figure)


def _epochs_before(jobs: Mapping[str, Job], name: str) -> int:
    start = jobs[name].start
    return 0 if start is None else _epochs_before(jobs, start) + jobs[start].stage.epochs


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
