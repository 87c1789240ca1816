"""What must hold before a GPU is held: storage, catalogue, backbones, pretrained weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from aliprod.catalogue import sources
from aliprod.catalogue.catalogue import Catalogue
from aliprod.errors import Refused, StorageFull, Unreachable
from aliprod.plan import graph, ledger
from aliprod.plan.graph import Job
from aliprod.plan.open import Request
from aliprod.plan.places import Places, catalogue_path
from aliprod.plan.schema import Plan, Synth
from aliprod.store import commit
from aliprod.synth.synth import synthesise


@dataclass(frozen=True)
class Prepared:
    """A request whose catalogue has been read.

    Attributes:
        todo: jobs that are not finished, the longest remaining path first.
        pretrained: file of each pretrained backbone that a job in ``todo`` starts from, by timm's name; empty
            before `with_pretrained`.
    """

    request: Request
    catalogue: Catalogue
    jobs: Mapping[str, Job]
    todo: tuple[str, ...]
    pretrained: Mapping[str, Path] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        return self.request.plan

    @property
    def places(self) -> Places:
        return self.request.places

    @property
    def folder(self) -> Path:
        """The plan's own, for what people open."""
        return self.places.of(self.plan)

    @property
    def hashes(self) -> Path:
        """The folder of the training images' hashes, made once for a catalogue."""
        return self.places.storage / "hashes" / self.catalogue.fingerprint

    def job_folder(self, name: str) -> Path:
        return ledger.folder(self.places.storage, self.jobs[name])


def prepare(request: Request) -> Prepared:
    """Read the catalogue (render it first where the plan says so) and see what is to be done.

    Raises:
        Refused: there is no catalogue.
        Unreachable: the storage path cannot be written.
    """
    check_storage(request.places.storage)
    path = catalogue_path(request.plan, request.places)
    source = request.plan.catalogue
    if source.path is None and source.synth is not None and not path.exists():
        _render(source.synth, path)
    catalogue = sources.read(path)
    if not len(catalogue.val) and not len(catalogue.test):
        raise Refused("has neither val nor test images: there is nothing to predict.", path, "Hold some images back.")
    _check_pseudo_labels(request.plan, catalogue)
    jobs = graph.jobs(request.plan, catalogue.fingerprint, catalogue.tree_fingerprint)
    return opened(request, catalogue, jobs)


def opened(request: Request, catalogue: Catalogue, jobs: Mapping[str, Job]) -> Prepared:
    """See what of a plan's jobs is to be done; nothing is checked or written."""
    unfinished = {name for name, job in jobs.items() if ledger.finished(request.places.storage, job) is None}
    todo = tuple(name for name in graph.order_by_remaining_work(jobs) if name in unfinished)
    return Prepared(request, catalogue, jobs, todo)


def with_pretrained(prepared: Prepared) -> Prepared:
    """Check the backbones with timm, and bring the weights that jobs start from into the storage path.

    Raises:
        Refused: a backbone that timm does not know, pretrained weights that cannot be had.
    """
    if not prepared.todo:
        return prepared
    from aliprod.models import weights  # timm takes seconds to import: not for a plan that is finished

    check_backbones(prepared.plan)
    files = {}
    for job in (prepared.jobs[name] for name in prepared.todo):
        if isinstance(job.stage.pretrained, str):
            files[job.network] = Path(job.stage.pretrained)
        elif job.stage.pretrained and not job.start and not job.soup:
            folder = prepared.places.storage / "pretrained" / job.network
            weights.fetch_pretrained(job.network, folder)
            files[job.network] = folder / f"{job.network}.safetensors"
    return replace(prepared, pretrained=files)


def check_backbones(plan: Plan) -> None:
    """Ask timm about each backbone.

    Raises:
        Refused: naming the first that cannot be one.
    """
    from aliprod.models.classifier import check_network  # as above

    for backbone, network in plan.backbones.items():
        check_network(network, f"[backbones] {backbone}")


def check_storage(storage: Path) -> None:
    """Write a file and take it away again.

    Raises:
        Unreachable: that failed.
    """
    try:
        commit.write_file(storage / ".writable", "")
        (storage / ".writable").unlink()
    except (StorageFull, OSError) as error:
        what = error.what if isinstance(error, StorageFull) else str(error)
        raise Unreachable(
            f"the storage path {what}", storage, "Give --storage a folder that you may write, with room."
        ) from error


def _check_pseudo_labels(plan: Plan, catalogue: Catalogue) -> None:
    """Refuse what would score a model on the very images that it was given labels of."""
    asked = [name for name in plan.job_names() if plan.edges(*name.split("/", 1))["pseudo_labels", "by"]]
    if not asked:
        return
    where = f"plan {plan.name}, {asked[0]}"
    if not len(catalogue.test):
        raise Refused("takes pseudo labels of test images, of which there are none.", where, "Leave pseudo_labels out.")
    if catalogue.test_labels is not None and plan.ensemble.score == "auto":
        raise Refused(
            "trains on test images, by their pseudo labels, and the plan's errors would be those on test.",
            where,
            'Say score = "val" in [ensemble].',
        )


def _render(synth: Synth, path: Path) -> None:
    try:
        synthesise(path, synth.classes, synth.images, synth.seed)
    except Refused:
        if not path.exists():  # else another driver was faster, with the same pictures
            raise
