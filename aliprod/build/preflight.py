"""What must hold before a GPU is held: storage, catalogue, backbones."""

from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from aliprod.build.target import Site, Target, render
from aliprod.catalogue import decode
from aliprod.catalogue.catalogue import Catalogue, Images
from aliprod.errors import Refused, StorageFull, Unreachable, listing
from aliprod.plan.open import Opened, Request, open_plan
from aliprod.plan.places import catalogue_path
from aliprod.plan.schema import Plan
from aliprod.recipe.options import needs
from aliprod.store import commit, lease, lineage, mirror
from aliprod.store.layout import cache, key_of

_TRIED = 24  # pictures, before a training


def prepare(request: Request) -> Opened:
    """Read the catalogue, rendered first where the plan says so, and find the jobs. Refused: there is no catalogue.
    Unreachable: the storage path cannot be written."""
    check_storage(request.places.storage)
    path, source = catalogue_path(request.plan, request.places), request.plan.catalogue
    if source.path is None and source.synth is not None:
        render(source.synth, path)
    if not path.exists():
        advice = "A plan's [catalogue] path is relative to the plan's file; in a bucket it is a prepared catalogue."
        raise Refused("is not there.", mirror.shown(path), advice)
    opened = open_plan(request)
    check_catalogue(opened.read_catalogue(), path)
    check_labellers(opened)
    return opened


def check_catalogue(catalogue: Catalogue, path: Path) -> None:
    """Refused: it has nothing to tell apart, or nothing to predict; or most pictures of a few cannot be read."""
    if catalogue.num_classes < 2:
        advice = "Is a folder or a column read as it is meant? `aliprod data check` shows how."
        raise Refused(f"has one class, {catalogue.name(0)}: there is nothing to tell apart.", path, advice)
    if not len(catalogue.val) and not len(catalogue.test):
        raise Refused("has neither val nor test images: there is nothing to predict.", path, "Hold some images back.")
    check_pictures(catalogue.train, path)


def check_pictures(images: Images, path: Path) -> None:
    """Refused: of a few, evenly spread, most cannot be read: grey squares would stand for them."""
    tried, reasons = np.linspace(0, len(images) - 1, min(_TRIED, len(images))).astype(int).tolist(), list[str]()
    for row in [] if images.store else tried:
        try:
            decode.opened(images.source(row))
        except decode.Unreadable as reason:
            reasons.append(f"{images.paths[row].as_py()} {reason}")
    if 2 * len(reasons) > len(tried):
        what = f"{len(reasons)} of {len(tried)} training pictures that were tried cannot be read: {reasons[0]}."
        raise Refused(what, path, "`aliprod data check` names all that are wrong.")


def check_labellers(opened: Opened) -> None:
    """Refuse what would score a model on the very images that it was given labels of. Refused: there are no test
    images, or the plan's errors would be those on test."""
    asked = [job.name for job in opened.jobs.values() if job.labellers]
    if not asked:
        return
    catalogue, where = opened.read_catalogue(), f"plan {opened.plan.name}, {asked[0]}"
    if not len(catalogue.test):
        raise Refused("takes pseudo labels of test images, of which there are none.", where, "Leave pseudo_labels out.")
    if catalogue.test_labels is not None and opened.plan.ensemble.score == "auto":
        what = "trains on test images, by their pseudo labels, and the plan's errors would be those on test."
        raise Refused(what, where, 'Say score = "val" in [ensemble].')


def check_storage(storage: Path) -> None:
    """Write a file and take it away again: the folder of leases stays, by which a catalogue around the storage path
    knows it. Unreachable: that failed."""
    try:
        commit.write_file(storage / lease.FOLDER / ".writable", "")
        commit.remove(storage / lease.FOLDER / ".writable")
    except (StorageFull, OSError) as error:
        what = error.what if isinstance(error, StorageFull) else str(error)
        advice = "Give --storage a folder that you may write, with room."
        raise Unreachable(f"the storage path {what}", storage, advice) from error


def make_first(opened: Opened, wanted: list[Target], site: Site) -> None:
    """Check the backbones with timm and make the first of the targets, in a process of its own: timm and torch take a
    gigabyte that the driver need not hold. What has passed once on this machine is not checked again. Refused: a
    backbone that timm does not know, pretrained weights that cannot be had."""
    passed = cache() / "checked" / _question(opened.plan)
    if passed.exists() and not wanted:
        return
    with ProcessPoolExecutor(1, get_context("spawn")) as child:
        child.submit(_make_first, opened.plan, wanted, site).result()
    with suppress(StorageFull):
        commit.write_file(passed, "")


def _question(plan: Plan) -> str:
    """A key of all that `check_backbones` depends on."""
    stages = [plan.stage(job) for job in plan.job_names()]
    asked = [stage.model_dump(mode="json", include={"crop", "crops", "test_crop", "objective"}) for stage in stages]
    software = [lineage.software(), *map(version, ("timm", "torch", "torchvision"))]
    return key_of({"backbones": plan.backbones, "jobs": plan.jobs, "asked": asked, "software": software})


def check_backbones(plan: Plan) -> None:
    """Ask timm about each backbone, and whether it takes the images of its stages and has what their objectives need.
    Refused: naming the first that cannot be one."""
    import torch

    from aliprod.models.classifier import check_network
    from aliprod.objectives import Context, build

    for backbone, network in plan.backbones.items():
        check_network(network, f"[backbones] {backbone}")
    for job in plan.job_names():
        network, stage = plan.backbones[job.partition("/")[0]], plan.stage(job)
        made, objective = check_network(network, job, stage.crop), stage.objective
        if any(check_network(network, job, crop).options != made.options for crop in stage.sizes):
            what = f"{network} is built for images of one size, not {listing(map(str, stage.sizes))}."
            raise Refused(what, job, "Leave crops and test_crop out.")
        if needs(objective.name, objective.options).maps:
            context = Context(2, made.channels, stage.crop, 1, side=made.side)
            try:
                with torch.device("meta"):
                    build(objective.name, objective.options, context)
            except Refused as error:
                raise Refused(error.what, job, error.advice) from None


def _make_first(plan: Plan, wanted: list[Target], site: Site) -> None:
    check_backbones(plan)
    for target in wanted:
        target.make(target, site)
