"""What one table of a plan says about another: jobs, starts, members, settings that do not go together."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import chain, islice
from typing import Any

from pydantic import ValidationError

from aliprod.errors import Refused, did_you_mean, listing, nearest
from aliprod.plan import networks
from aliprod.plan.schema import Edge, Plan, Settings, effective
from aliprod.plan.source import MOST_NAMES, Key, Problem, dotted, shown, unknown
from aliprod.recipe import Needs, ObjectiveRecipe, Stage
from aliprod.recipe.options import needs, refusals

_MOST_MENDED = 20  # misspelt names, so that a hostile plan takes no minutes


def mended(plan: Plan) -> tuple[Plan | None, list[Problem]]:
    """The plan with its misspelt backbones and stages as they are meant, so that what says them right is no problem
    too; with what was wrong. None where that is too much to guess from."""
    plan, problems = _defined(plan)
    problems += islice(_misnamed(plan), _MOST_MENDED)
    if len(problems) >= _MOST_MENDED:
        return None, problems
    jobs = dict[str, list[str]]()
    for said, stages in plan.jobs.items():
        names = [_near(name, plan.stages) for name in stages]
        jobs.setdefault(_near(said, plan.backbones), []).extend(filter(None, names))
    jobs.pop("", None)
    return plan.model_copy(update={"jobs": jobs}), problems


def _defined(plan: Plan) -> tuple[Plan, list[Problem]]:
    """Backbones and stages under the names that the rest of the plan says, where all of it agrees on another."""
    members = [member.partition("/")[::2] for member in plan.ensemble.members]
    starts = [start for table in plan.stages.values() if isinstance(start := table.get("start"), str)]
    found, problems = dict[str, dict[str, Any]](), list[Problem]()
    for group, known, said in (
        ("backbones", plan.backbones, [*plan.jobs, *(backbone for backbone, _ in members)]),
        ("stages", plan.stages, [*chain(*plan.jobs.values()), *starts, *(stage for _, stage in members)]),
    ):
        count = Counter(said)
        strange = [name for name, times in count.items() if name not in known and times > 1]
        idle = (name for name in known if strange and name not in count)
        right = {name: near for name in islice(idle, _MOST_MENDED) if (near := nearest(name[:128], strange))}
        for name, near in right.items():
            sentence = f"{group}: no job is of {shown(name)}, and the plan says {shown(near)} {count[near]} times."
            problems.append(Problem((group, name), sentence, f"Did you mean {near}?"))
        found[group] = {right.get(name, name): value for name, value in known.items()}
    return plan.model_copy(update=found), problems


def _misnamed(plan: Plan) -> Iterator[Problem]:
    """Jobs of backbones and stages that are not there, or are there twice."""
    for backbone, stages in plan.jobs.items():
        key: Key = ("jobs", backbone)
        if backbone not in plan.backbones:
            yield unknown(key, f"jobs: there is no backbone {shown(backbone)}.", backbone, plan.backbones, "Backbones")
        for name, count in Counter(stages).items():
            if name not in plan.stages:
                sentence = f"{dotted(key)}: there is no stage {shown(name)}."
                yield unknown(key, sentence, name, plan.stages, "Stages", quoted=name)
            elif count > 1:
                yield Problem(key, f"{dotted(key)} says {shown(name)} {count} times.", quoted=name)


def _near(name: str, known: Mapping[str, object]) -> str:
    return name if name in known else nearest(name[:128], islice(known, MOST_NAMES))


def unknown_networks(plan: Plan) -> Iterator[Problem]:
    """Networks and tags of weights that timm does not have."""
    complaints = ((name, *networks.complaint(network)) for name, network in plan.backbones.items())
    for name, sentence, advice in islice((found for found in complaints if found[1]), _MOST_MENDED):
        key: Key = ("backbones", name)
        yield Problem(key, f"{dotted(key)}: {sentence}", advice)


def names_of_jobs(plan: Plan) -> Iterator[Problem]:
    """Overrides, ranks and members that are of no job, or stand there twice."""
    jobs = list(plan.job_names())
    known = dict.fromkeys([*plan.backbones, *jobs])
    for target in (one for one in plan.overrides if one not in known):
        sentence = f"overrides: {shown(target)} is neither a backbone nor a job of this plan."
        yield unknown(("overrides", target), sentence, target, known, "Backbones and jobs")
    ranks = plan.cluster.ranks if isinstance(plan.cluster.ranks, dict) else {}
    for job in (one for one in ranks if one not in known):
        sentence = f"cluster.ranks: {shown(job)} is neither a backbone nor a job of this plan."
        yield unknown(("cluster", "ranks", job), sentence, job, known, "Backbones and jobs")
    key: Key = ("ensemble", "members")
    for member, count in Counter(plan.ensemble.members).items():
        if member not in jobs:
            backbone = member.partition("/")[0]
            its = [job for job in jobs if job.startswith(f"{backbone}/")]
            sentence = f"member {shown(member)} is not a job of this plan."
            listed = f"Jobs of {backbone}" if its else "Jobs"
            yield unknown(key, sentence, member, its or jobs, listed, quoted=member)
        elif count > 1:
            yield Problem(key, f"member {shown(member)} stands there {count} times.", quoted=member)


def edges(plan: Plan) -> Iterator[Problem]:
    """Jobs that start from, learn from or are made of one that is not there, or of each other in a circle."""
    parents: dict[str, list[str]] = {job: [] for job in plan.job_names()}
    for job, needed in parents.items():
        for edge, targets in plan.edges(job).items():
            yield from (_missing(plan, job, edge, to, parents) for to in targets if to not in parents)
            yield from _misshapen(plan, job, edge, [to for to in targets if to in parents])
            needed.extend(targets)
    try:
        TopologicalSorter(parents).prepare()
    except CycleError as error:
        circle = error.args[1]
        edge = next(edge for edge, targets in plan.edges(circle[1]).items() if circle[0] in targets)
        key = _origin(plan, circle[1], *edge)
        alone = len({job.partition("/")[0] for job in circle}) == 1
        shown_circle = " > ".join(job.partition("/")[2] if alone else job for job in circle)
        which = "stages" if alone else "jobs"
        yield Problem(key, f"{dotted(key)}: {which} need each other in a circle: {shown_circle}.")


def together(plan: Plan, wrong: set[Key]) -> Iterator[Problem]:
    """Settings that are right each by itself, but not in one stage. ``wrong``: keys of tables that have problems of
    their own; what they take part in is not asked about."""
    used = {name for stages in plan.jobs.values() for name in stages}
    alone = [("", {("stages", name): table}) for name, table in plan.stages.items() if name not in used]
    for job, layers in (*alone, *((job, plan.layers(job)) for job in dict.fromkeys(plan.job_names()))):
        if wrong & {("defaults",), *layers}:
            continue
        tables = [*layers.values()]
        found = _clashes(plan, job, tables)
        by_table = [(key, _clashes(plan, job, tables[:count])) for count, key in enumerate(layers, 1)] if found else []
        for reason in found:  # at the first table with which it is so
            key = next(key for key, reasons in by_table if reason in reasons)
            yield Problem(key, f"{dotted(key)}: {reason}.")


def stage_with(plan: Plan, job: str, settings: Settings) -> Stage:
    """A job's stage with other settings. ValueError: they are not for this stage; says why."""
    other = plan.with_settings(job, settings)
    if found := _clashes(other, job, other.layers(job).values()):
        raise ValueError("; ".join(found))
    return other.stage(job)


def remarks(plan: Plan) -> Iterator[str]:
    """What is allowed and does nothing."""
    used = {name for stages in plan.jobs.values() for name in stages}
    for group, known, needed in (("backbones", plan.backbones, {*plan.jobs}), ("stages", plan.stages, used)):
        for name in islice((name for name in known if name not in needed), _MOST_MENDED):
            yield f"{dotted((group, name))}: no job is of it. {did_you_mean(name[:128], needed)}".rstrip()
    idle: dict[str, list[str]] = {}
    for job in plan.job_names():
        stage = plan.stage(job)
        if late := [one for one in stage.lr.milestones if one >= stage.epochs]:
            idle.setdefault(f"lr.milestones {late} are never reached: epochs = {stage.epochs}.", []).append(job)
        if "gamma" in stage.lr.model_fields_set and not stage.lr.milestones:
            idle.setdefault("lr.gamma does nothing without lr.milestones.", []).append(job)
    yield from (f"{listing(jobs)}: {sentence}" for sentence, jobs in idle.items())


def _clashes(plan: Plan, job: str, tables: Iterable[Settings]) -> list[str]:
    """What does not go together in a stage, or with the network and the ranks of its job."""
    try:
        stage = effective(plan.seed, plan.defaults, tables)
    except ValidationError as error:
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ").split("\n")
    network = plan.backbones.get(job.partition("/")[0], "")
    found = [
        _undealt(stage, *plan.cluster.ranks_of(job)),
        next(filter(None, (networks.misfit(network, crop) for crop in stage.sizes)), "")
        or _off_grid(stage, networks.stride(network) if network else 32),
        *_objections(stage, network),
    ]
    return [reason for reason in found if reason]


def _objections(stage: Stage, network: str) -> Iterator[str]:
    """What an objective has against its stage, and a network whose pretrained weights nobody has made."""
    name, options = stage.objective.name, stage.objective.options
    asked = needs(name, options)
    if stage.crops and asked.maps:
        yield f"crops change what {name} looks at, places of one size: leave them out"
    if asked.teacher and not stage.teachers:
        yield f'objective {name} learns from other jobs: say which, teachers = ["BACKBONE/STAGE"]'
    if stage.teachers and not asked.teacher:
        yield f"objective {name} learns from no teachers: leave them out"
    if stage.features == "cached" and (asked.maps or asked.pixels or asked.branches > 1):  # more than pooled features
        yield f'objective {name} looks at the images: say features = "computed", or another objective'
    yield from (f"{what}: {advice}".rstrip(" .:") for what, advice in refusals(name, options))
    fetched = stage.pretrained is True and stage.start is None and stage.soup is None
    if fetched and (known := networks.facts(network)) and not known.tags:
        own = "say pretrained = false, or a safetensors file of your own"
        yield f"timm has no pretrained weights for {network}: {own}"


def _undealt(stage: Stage, fewest: int, most: int) -> str:
    """A step that cannot be dealt to its shares, or these to the ranks that are asked for."""
    if not stage.is_trained:
        return ""
    if stage.shares == "ranks" and fewest != most:
        return 'shares = "ranks" makes results depend on the ranks: say how many, [cluster] ranks = 2'
    group = needs(stage.objective.name, stage.objective.options).group
    shares = most if stage.shares == "ranks" else stage.shares
    if stage.batch_size // group % shares:
        whole = f"{shares} shares" + (f" in groups of {group} images of one class" if group > 1 else "")
        fits = shares * group
        return f"batch_size = {stage.batch_size} cannot be dealt to {whole}; a multiple of {fits} can"
    if stage.shares == "ranks" or fewest <= 1 << (min(most, shares).bit_length() - 1):  # it may have that power of two
        return ""
    said = f"[cluster] ranks = {fewest if fewest == most else [fewest, most]}"
    if fewest > shares:
        advice = f'say shares = {1 << (fewest - 1).bit_length()}, or shares = "ranks"'
        return f"{said} is more than shares = {shares}, into which a step falls: {advice}"
    return f"{said} holds no power of two, as shares are" if fewest <= most else f"{said} is upside down"


def _off_grid(stage: Stage, stride: int | None) -> str:
    """DCL cuts the crop into parts x parts cells; the feature map, crop / stride a side, must fall into the same."""
    parts = stage.objective.options.get("parts")
    if stage.objective.name != "dcl" or not isinstance(parts, int) or parts < 1 or stride is None:
        return ""
    if not stride:
        return "dcl looks at places, and this network makes no map of them (docs/networks.md)"
    cells = stage.crop // stride
    if cells and cells % parts == 0:
        return ""
    fitting = " or ".join(str(stride * parts * times) for times in (1, 2))
    return f"crop = {stage.crop} gives {cells} cells a side, no multiple of parts = {parts}; {fitting} would fit"


def _missing(plan: Plan, job: str, edge: Edge, target: str, jobs: Iterable[str]) -> Problem:
    backbone, _, name = job.partition("/")
    key = _origin(plan, job, *edge)
    if edge[0] not in ("start", "soup"):
        sentence = f"{dotted(key)}: {shown(target)} is not a job of this plan."
        return unknown(key, sentence, target, jobs, "Jobs", quoted=target)
    stage = target.removeprefix(f"{backbone}/")
    if stage not in plan.stages:
        sentence = f"{dotted(key)}: there is no stage {shown(stage)}."
        return unknown(key, sentence, stage, plan.stages, "Stages", quoted=None if edge == ("start",) else stage)
    listed: Key = ("jobs", backbone)
    verb = "starts from" if edge == ("start",) else "is made of"
    sentence = f"{dotted(listed)}: {shown(name)} {verb} {shown(stage)}, which is not in the list."
    return Problem(listed, sentence, f"Add {shown(stage)}: it is trained once, whoever needs it.")


def _misshapen(plan: Plan, job: str, edge: Edge, targets: Iterable[str]) -> Iterator[Problem]:
    """Weights that do not fit: of a network with more branches (BBN), or centres of a class, than the job's, or without
    a classifier."""
    own = _shape(plan, job)
    for target in targets if edge[0] in ("start", "soup") else ():
        key = _origin(plan, job, *edge)
        if plan.said(target).get("neighbours"):
            sentence = f"{dotted(key)}: {shown(target)} has neighbours in place of a classifier."
            yield Problem(key, sentence, "Start from another job, or from pretrained weights.", quoted=None)
        for what, theirs in _shape(plan, target).items():
            if theirs not in ({own[what]} if edge[0] == "soup" else {1, own[what]}):
                sentence = f"{dotted(key)}: the network of {shown(target)} has {theirs} {what}, not {own[what]}."
                yield Problem(key, sentence, "Start from another job, or give both the same objective.", quoted=None)


def _shape(plan: Plan, job: str) -> dict[str, int]:
    """Branches of a job's network, and centres of a class; 1 where what its objective is called is wrong."""
    said = plan.said(job).get("objective")
    try:
        objective = ObjectiveRecipe.model_validate({"name": said} if isinstance(said, str) else said or {"name": ""})
        asked = needs(objective.name, objective.options)
    except (ValidationError, Refused):
        asked = Needs()
    return {"branches": asked.branches, "centres of a class": asked.centres}


def _origin(plan: Plan, job: str, setting: str, *below: str) -> Key:
    """Key of a setting in the table that has the last word on it."""
    said: list[Key] = [key for key, table in plan.layers(job).items() if setting in table]
    return (*(said[-1] if said else ("defaults",)), setting, *below)
