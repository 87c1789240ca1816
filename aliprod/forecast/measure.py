"""What `aliprod benchmark` does with a plan: each distinct piece of its jobs' work is measured, and kept."""

import os
from collections.abc import Iterator
from typing import Any

import torch

from aliprod.build.preflight import check_backbones, prepare
from aliprod.errors import Failed
from aliprod.forecast import rates
from aliprod.forecast.rates import Piece
from aliprod.plan.open import Opened, Request
from aliprod.recipe import Part
from aliprod.training.speed import measure, measure_prediction


def measure_plan(request: Request, part: Part, steps: int) -> Iterator[dict[str, Any]]:
    """Measure on this machine, one rank's share of a batch on its first GPU where it has one; yield each result.

    Args:
        steps: that are counted of each piece; of predictions a quarter as many batches.
    Raises:
        Refused: there is no catalogue, or timm knows no such network.
        Failed: a step does not fit in the GPU's memory. What was measured before is kept.
    """
    opened = prepare(request)
    check_backbones(request.plan)
    for piece in rates.pieces(opened, part):
        try:
            measured = _measured(opened, piece, steps)
        except torch.OutOfMemoryError as error:
            advice = "Lower batch_size or crop, or raise shares: so many images at a time fit better."
            raise Failed("does not fit in the GPU's memory.", piece.job.name, advice) from error
        measured |= {"cpus": len(os.sched_getaffinity(0))}
        rates.keep(opened, piece, measured)
        yield {"part": piece.part, "jobs": list(piece.jobs), **measured}


def _measured(opened: Opened, piece: Piece, steps: int) -> dict[str, Any]:
    job, cluster, catalogue = piece.job, opened.plan.cluster, opened.read_catalogue()
    match piece.part:
        case "center" | "ten_crop" as views:
            batches = max(1, steps // 4)
            return measure_prediction(job.stage, job.network, views, catalogue, batches, cluster)
        case part:
            stage = rates.bare(job.stage)
            if stage.shares == "ranks":  # one of them is measured
                _, ranks = cluster.ranks_of(job.name)
                stage = stage.model_copy(update={"batch_size": max(1, stage.batch_size // ranks)})
            return measure(part, stage, job.network, catalogue, steps, cluster)
