"""How a plan's page in MLflow looks: a saved view, kept as a tag of the experiment, which links open.

Without it MLflow folds the jobs' runs below the plan's, and draws only what is unfolded. Sorted by a metric they lie
side by side. The words are those of the UI of MLflow 3.17; an older one shows its own columns.
"""

import json
from typing import Any
from urllib.parse import urlencode

BEST = "best/top1_error"  # of all epochs so far
EPOCH, STATE = "aliprod.epoch", "aliprod.state"
TAG = "mlflow.sharedViewState.aliprod"
_METRICS = (BEST, "val/top1_error", "val/top5_error", "val/loss", "train/loss", "top1_error")
_COLUMNS = [
    *(f"tags.`{name}`" for name in (STATE, EPOCH)),
    *(f"metrics.`{name}`" for name in _METRICS),
    *(f"attributes.`{name}`" for name in ("Dataset", "Version")),
]
_SECTIONS = ("best", "confusions", "val", "train", "lr", "speed")  # of charts, by the first word of a metric


def saved() -> str:
    """The value of `TAG`: the runs of jobs and ensembles, the best first, and their charts, two in a row."""
    state: dict[str, Any] = {"searchFilter": "tags.`aliprod.kind` != 'plan'", "runsHiddenMode": "FIRST_20_RUNS"}
    state |= {"orderByKey": f"metrics.`{BEST}`", "orderByAsc": True}
    state |= {"selectedColumns": _COLUMNS, "columnOrder": _COLUMNS}
    sections = [{"uuid": name, "name": name, "display": True, "columns": 2} for name in _SECTIONS]
    state |= {"compareRunSections": sections, "isAccordionReordered": True, "compareRunCharts": []}  # MLflow adds some
    return json.dumps({"name": "jobs", "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def page(experiment_id: str, charts: bool = False) -> str:
    """The view's place in the UI, below ``/#/``. Without the first word it opens a view of language models."""
    words = {"workflowType": "machine_learning", "viewStateShareKey": TAG.rpartition(".")[2]}
    return f"experiments/{experiment_id}/runs?{urlencode(words | ({'compareRunsMode': 'CHART'} if charts else {}))}"
