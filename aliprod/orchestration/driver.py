"""The driver: what `aliprod run` and a submitted job do. It launches, waits, gathers, and yields events."""

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import ray
import ray.exceptions

from aliprod.errors import Failed
from aliprod.orchestration import cluster, gather, inputs, launch, members, steps
from aliprod.orchestration.board import Board
from aliprod.orchestration.gather import Prediction
from aliprod.orchestration.prepare import Prepared, prepare, with_pretrained
from aliprod.orchestration.scheduler import Share, Task, execute
from aliprod.orchestration.steps import Splits, Step
from aliprod.plan.events import Ended, Event, Said
from aliprod.plan.open import Request
from aliprod.store import commit, lineage
from aliprod.tracking.registry import Choice
from aliprod.tracking.runs import Tracking
from aliprod.training.training_job import TrainingJob

_TICK_SECONDS = 0.5
_FLUSH_SECONDS = 60.0
_HURRIED_SECONDS = 10.0  # of a run that was told to stop


class _Session:
    """The cluster, joined when there is something to do on it, and whether a person wants the run to stop."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.stop, self.lease = prepared, threading.Event(), None

    def join(self) -> None:
        if self.lease is not None:
            return
        cluster.join(self.prepared.places.address)
        if threading.current_thread() is threading.main_thread():  # after ray.init, which sets handlers of its own
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._told_to_stop)
        self.lease = cluster.hold(self.prepared.plan.name, self.prepared.places.storage)
        cluster.probe(self.prepared.places.storage)

    def check(self) -> None:
        """End the run where it was told to stop; what it has running ends with its session of Ray."""
        if self.stop.is_set():
            raise KeyboardInterrupt

    def _told_to_stop(self, *_: object) -> None:
        if self.stop.is_set():  # twice: at once
            raise KeyboardInterrupt
        self.stop.set()


def run(request: Request) -> Iterator[Event]:
    """Train what is not finished, then gather the ensemble.

    Yields:
        Events; the last is `Ended`.
    Raises:
        Refused: the input is wrong, nothing was started. Unreachable: cluster, storage or, at the start, MLflow.
        Failed: the ensemble cannot be made. KeyboardInterrupt: it was told to stop.
    """
    yield from _says(request.places.note)
    yield from _driven(with_pretrained(prepare(request)))


def ensemble(request: Request) -> Iterator[Event]:
    """Gather the ensemble anew from the chosen checkpoints; trains nothing.

    Raises:
        Failed: a member is not trained yet. Else as `run`.
    """
    yield from _says(request.places.note)
    prepared = prepare(request)
    if missing := [name for name in request.plan.ensemble.members if name in prepared.todo]:
        raise Failed(f"not trained yet: {', '.join(missing)}.", request.plan.name, "Run the plan first.")
    finished = {name: job for name, job in prepared.jobs.items() if name not in prepared.todo}
    yield from _driven(Prepared(request, prepared.catalogue, finished, ()))


def _driven(prepared: Prepared) -> Iterator[Event]:
    said: list[str] = []
    places, session = prepared.places, _Session(prepared)
    tracking = Tracking.connect(places.tracking_uri, prepared.plan.name, places.artifacts, said.append)
    try:
        if prepared.todo:
            session.join()  # first: where another driver has this plan, nothing is told of ours
        yield from _tracked(Board(prepared, tracking), session, said)
    finally:
        ray.shutdown()


def _tracked(board: Board, session: _Session, said: list[str]) -> Iterator[Event]:
    text, tracking = board.prepared.request.text, board.tracking
    tracking.plan_started(text, board.prepared.plan.digest, board.table())
    status = "FAILED"
    try:
        for event in _stages(board, session):
            yield event
            yield from _drained(said)
        if not board.jobs_in("failed", "not_run"):
            status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        ray.shutdown()  # what runs ends now, not after MLflow has been told
        tracking.plan_finished(status)
        unsent = tracking.flush(_HURRIED_SECONDS if status == "KILLED" else _FLUSH_SECONDS)
    yield from _drained([*said, *unsent])
    yield Said(f"MLflow: {tracking.page}")
    yield Ended(json.loads((board.prepared.folder / "result.json").read_text(encoding="utf-8")))


def _stages(board: Board, session: _Session) -> Iterator[Event]:
    """Reuse, train, choose, predict, add up; the outcome ends up in result.json."""
    if not len(board.prepared.catalogue.val):
        yield Said("There are no val images: the last checkpoint of each job is its member.")
    yield from board.reuse()
    if board.prepared.todo:
        yield from _train(board, session)
    result = None
    if not board.jobs_in("failed", "not_run"):
        unsent = board.tracking.flush(_FLUSH_SECONDS)
        choices, note = members.choose(board.prepared, board.tracking.registry, complete=not unsent)
        yield from _says(note)
        which = steps.splits(board.prepared.catalogue, board.prepared.plan.ensemble.score)
        key = members.ensemble_key(board.prepared, choices, which)
        if not gather.is_done(board.prepared.folder, key):
            yield from _gather(board, choices, which, key, session)
        result = _result(board.prepared, choices, which)
        board.tracking.ensemble(key, choices, result)
        if which.main == "test":
            origin = members.origin(board.prepared, choices, key, result)
            lineage.keep(board.prepared.folder / "submission.csv", origin)
    outcome = {
        "plan": board.prepared.plan.name,
        "trained": board.jobs_in("finished"),
        "reused": board.jobs_in("reused"),
        "failed": board.jobs_in("failed"),
        "not_run": board.jobs_in("not_run"),
        "ensemble": result,
    }
    commit.write_file(board.prepared.folder / "result.json", json.dumps(outcome, indent=1))


def _train(board: Board, session: _Session) -> Iterator[Event]:
    """Train in order of the longest remaining path, and predict each member as soon as it is trained."""
    prepared = board.prepared
    session.join()
    gpu = cluster.uses_gpu(prepared.plan.cluster)
    cluster.check_room(prepared.plan.cluster, steps.ranks(prepared.plan.cluster, gpu))
    which = steps.splits(prepared.catalogue, prepared.plan.ensemble.score)
    tasks = [
        Task(step.name, step.needs, step.share, partial(_start, prepared, step, gpu))
        for step in steps.training(prepared.jobs, prepared.todo, which, prepared.plan.cluster, gpu)
    ]
    yield from _execute(board, tasks, session)


def _gather(board: Board, choices: Mapping[str, Choice], which: Splits, key: str, session: _Session) -> Iterator[Event]:
    """Predict what the choices lack, then run the final task."""
    prepared = board.prepared
    session.join()
    gpu = cluster.uses_gpu(prepared.plan.cluster)
    wanted: dict[str, dict[str, Any]] = {name: {} for name in choices}
    tasks = []
    for name, choice in choices.items():
        for split in which.all:
            prediction = members.prediction(prepared, name, choice, split)
            wanted[name][split] = prediction.folder
            if commit.read(prediction.folder) is not None:
                continue
            if commit.read(prediction.weights) is None:
                board.tracking.registry.download(choice, prediction.weights)
            share = steps.one(prepared.plan.cluster, gpu)
            start = partial(_predict, prepared, prediction, share)
            tasks.append(Task(f"{name} {split}", (), share, start))
    yield from _execute(board, tasks, session)
    if failed := board.jobs_in("failed"):
        raise Failed(f"the probabilities of {', '.join(failed)} are missing: no ensemble was written.")
    yield Said(f"Adding up {len(choices)} members.")
    total = [gather.start_sum(wanted, which, prepared.folder, key)]
    while not (ended := _wait(total)):
        session.check()
    [(_, failure)] = ended
    if failure:
        raise Failed(failure)


def _execute(board: Board, tasks: list[Task], session: _Session) -> Iterator[Event]:
    settings = board.prepared.plan.cluster
    capacity = partial(cluster.limit, settings)
    for change in execute(tasks, capacity, _wait, session.stop.is_set, settings.max_parallel_jobs):
        yield from board.reports()
        if change is not None:
            yield from board.tell(change)
        session.check()


def _wait(handles: list[Any]) -> list[tuple[Any, str]]:
    """Wait a moment for any of the handles; each that ended, with why it failed or ''."""
    if not handles:
        time.sleep(_TICK_SECONDS)
        return []
    done, _ = ray.wait(handles, num_returns=1, timeout=_TICK_SECONDS)
    return [(handle, _failure(handle)) for handle in done]


def _failure(handle: Any) -> str:
    try:
        return str(ray.get(handle))
    except ray.exceptions.RayError as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"


def _start(prepared: Prepared, step: Step, gpu: bool) -> Any:
    match step.kind:
        case "train":
            return _launch(prepared, step.job, gpu)
        case "predict":  # with the best, which is what the ensemble takes unless a person says otherwise
            best = members.best_of(prepared, step.job)
            return _predict(prepared, members.prediction(prepared, step.job, best, step.of), step.share)
    return inputs.start(prepared, step)


def _launch(prepared: Prepared, name: str, gpu: bool) -> Any:
    job, settings = prepared.jobs[name], prepared.plan.cluster
    folder, made = prepared.job_folder(name), inputs.inputs(prepared, name)
    training = TrainingJob(name, str(job.key), job.network, job.stage, folder, made, settings)
    return launch.launch(training, prepared.catalogue.root, settings, gpu, prepared.places.storage / "ray")


def _predict(prepared: Prepared, prediction: Prediction, share: Share) -> Any:
    return gather.start_prediction(prediction, prepared.catalogue.root, share, prepared.plan.cluster.loader_processes)


def _result(prepared: Prepared, choices: Mapping[str, Choice], which: Splits) -> dict[str, Any]:
    scores = gather.scores(prepared.folder)
    return {
        "members": {
            name: {"top1_error": scores["members"][name], "version": choice.version} for name, choice in choices.items()
        },
        "top1_error": scores["ensemble"],
        "split": which.scored,
        "submission": str(prepared.folder / "submission.csv") if which.main == "test" else None,
        "probabilities": str(prepared.folder / "ensemble"),
    }


def _says(text: str) -> Iterator[Event]:
    if text:
        yield Said(text)


def _drained(texts: list[str]) -> Iterator[Event]:
    while texts:
        yield Said(texts.pop(0))
