"""checks: jobs that learn from others are refused where those are not there, go in circles or do not fit."""

from collections.abc import Callable
from pathlib import Path

import pytest

from aliprod.errors import Refused
from aliprod.plan.checks import remarks
from aliprod.plan.schema import Plan

Load = Callable[..., Plan]

# After stages.dcl, a stage more, which net-b3 has beside the others.
MORE = "[stages.more]\n%s\n\n[overrides.net-b3]\nlr = { heads = 0.5 }"
OLD = "[overrides.net-b3]\nlr = { heads = 0.5 }"


def with_stage(small: str, *settings: str) -> str:
    text = small.replace('net-b3 = ["full", "dcl"]', 'net-b3 = ["full", "dcl", "more"]')
    return text.replace(OLD, MORE % "\n".join(settings))


def refusal(load_text: Load, text: str) -> str:
    with pytest.raises(Refused) as caught:
        load_text(text)
    assert caught.value.status == 2
    return str(caught.value)


def line(text: str, start: str) -> int:
    return 1 + next(number for number, line in enumerate(text.split("\n")) if line.startswith(start))


DISTILLED = 'objective = "distillation"'


@pytest.mark.parametrize(
    "settings",
    [
        ('start = "full"', DISTILLED, 'teachers = ["resnet/full", "net-b3/dcl"]'),
        ('start = "full"', 'pseudo_labels = { by = ["resnet/full", "net-b3/dcl"] }'),
        ('soup = { of = ["full", "dcl"] }',),
        ('start = "full"', 'objective = "bbn"'),
        ('start = "full"', 'trains = "classifier"', 'sampler = "class_balanced"'),
        ('trains = "classifier"',),
        ('start = "full"', 'trains = "norms"', "test_crop = 64"),
        ("crops = [16, 32]", "crop = 32", "epochs = 2"),
        ('start = "full"', 'duplicates = "teacher"'),
        ('duplicates = "drop"',),
        (DISTILLED, 'teachers = ["resnet/full"]', 'duplicates = "majority"'),
    ],
)
def test_what_goes_together_is_accepted(load_text: Load, small: str, settings: tuple[str, ...]) -> None:
    assert "net-b3/more" in set(load_text(with_stage(small, *settings)).job_names())


@pytest.mark.parametrize(
    ("settings", "at", "says"),
    [
        (
            (DISTILLED, 'teachers = ["resnet/ful"]'),
            "teachers",
            'stages.more.teachers: "resnet/ful" is not a job of this plan.|Did you mean resnet/full?',
        ),
        (
            (DISTILLED, 'teachers = ["full"]'),
            "teachers",
            'stages.more.teachers: "full" is not a job of this plan.|Jobs: resnet/dcl, resnet/full',
        ),
        (
            ('pseudo_labels = { by = ["resnet/dlc"] }',),
            "pseudo_labels",
            'stages.more.pseudo_labels.by: "resnet/dlc" is not a job of this plan.|Did you mean resnet/dcl?',
        ),
        (
            ('soup = { of = ["full", "dlc"] }',),
            "soup",
            'stages.more.soup.of: there is no stage "dlc".|Did you mean dcl?',
        ),
        ((DISTILLED,), "[stages.more]", "objective distillation learns from other jobs: say which, teachers ="),
        (('teachers = ["resnet/full"]',), "[stages.more]", "cross_entropy learns from no teachers: leave them out"),
        (
            (DISTILLED, 'teachers = ["resnet/full"]', 'pseudo_labels = { by = ["resnet/full"] }'),
            "[stages.more]",
            "teachers have seen the training images alone: leave pseudo_labels or teachers out",
        ),
        (('start = "dcl"', 'soup = { of = ["full", "dcl"] }'), "[stages.more]", "a soup trains nothing: leave start"),
        (("epochs = 3", 'soup = { of = ["full", "dcl"] }'), "[stages.more]", "a soup trains nothing: leave start"),
        (('soup = { of = ["full"] }',), "soup", 'soup.of = ["full"] must be a list of at least 2'),
        (
            ('trains = "classifier"', "pretrained = false"),
            "[stages.more]",
            'trains = "classifier" needs a backbone that has learned something: a start, or pretrained = true',
        ),
        (('trains = "norms"',), "[stages.more]", 'trains = "norms" needs a classifier that has learned something: a'),
        (
            ('norm_statistics = "frozen"', "pretrained = false"),
            "[stages.more]",
            'norm_statistics = "frozen" needs weights that have some: a start, or pretrained = true',
        ),
        (("crops = [16, 48]", "crop = 32", "epochs = 2"), "[stages.more]", "crops = [16, 48]: the last is crop = 32"),
        (("crops = [16, 32]", "crop = 32", "epochs = 1"), "[stages.more]", "and there is an epoch for each"),
        (
            ("crops = [16, 32]", "crop = 32", "epochs = 2", 'objective = { name = "dcl", parts = 1 }'),
            "[stages.more]",
            "crops change what dcl looks at, places of one size: leave them out",
        ),
        (
            ("test_crop = 4096", "crop = 32"),
            "[stages.more]",
            "with crops and test_crop to more than 4096",
        ),
        (('duplicates = "teacher"',), "[stages.more]", 'duplicates = "teacher" needs a start: it is the teacher'),
        (
            ('augmentation = ["resize", "aug_mix"]', 'augment = "device"'),
            "[stages.more]",
            'aug_mix is made by loaders alone: leave augment = "device" out, or aug_mix; auto_augment, rand_augment',
        ),
        (
            ('augment = "device"', 'resizing = "torch"'),
            "[stages.more]",
            'augment = "device" gives Pillow\'s pixels: leave resizing = "torch" out',
        ),
        (
            ("pseudo_labels = { by = [] }",),
            "pseudo_labels",
            "stages.more.pseudo_labels.by = [] must be a list of at least 1",
        ),
        (
            ('pseudo_labels = { by = ["resnet/full"], threshold = 90 }',),
            "pseudo_labels",
            "stages.more.pseudo_labels.threshold = 90 must be at most 1",
        ),
        (('soup = { of = ["full", "more"] }',), "soup", "stages need each other in a circle: more > more"),
    ],
)
def test_what_does_not_is_said_with_line_key_and_nearest_name(
    load_text: Load, small: str, tmp_path: Path, settings: tuple[str, ...], at: str, says: str
) -> None:
    text = with_stage(small, *settings)
    message = refusal(load_text, text)
    assert f"{tmp_path / 'plan.toml'}, line {line(text, at)}: " in message
    for words in says.split("|"):
        assert words in message


def test_all_that_does_not_go_together_in_a_stage_is_said(load_text: Load, small: str) -> None:
    said = refusal(
        load_text, with_stage(small, 'start = "full"', "crop = 999", "epochs = 2", "lr = { warmup_epochs = 9 }")
    )
    assert "crop = 999 is larger than resize" in said
    assert "lr.warmup_epochs = 9 is longer than the stage: epochs = 2" in said


def test_an_objective_of_a_kind_that_is_none_is_refused_with_the_nearest(load_text: Load, small: str) -> None:
    said = refusal(load_text, with_stage(small, 'objective = { name = "hierarchy", kind = "margnal" }'))
    assert "Did you mean marginal?" in said


def test_a_soup_ignores_the_epochs_of_the_defaults(load_text: Load, small: str) -> None:
    plan = load_text(with_stage(small, 'soup = { of = ["full", "dcl"] }'), ["defaults.epochs=7"])
    assert [plan.stage(f"resnet/{name}").epochs for name in ("full", "more")] == [2, 1]


def test_a_soup_of_a_stage_that_the_backbone_has_not_is_told_where_to_add_it(load_text: Load, small: str) -> None:
    text = with_stage(small, 'soup = { of = ["full", "other"] }').replace(
        "[stages.dcl]", "[stages.other]\nepochs = 3\n\n[stages.dcl]"
    )
    message = refusal(load_text, text)
    assert (
        f'line {line(text, "net-b3 = [")}: jobs.net-b3: "more" is made of "other", which is not in the list' in message
    )
    assert 'Add "other"' in message


@pytest.mark.parametrize("edge", ["teachers = [%s]", "pseudo_labels = { by = [%s] }"])
def test_backbones_that_learn_from_each_other_in_a_circle_are_named(load_text: Load, small: str, edge: str) -> None:
    objective = f"{DISTILLED}\n" if edge.startswith("teachers") else ""
    tables = "".join(
        f'[overrides."{job}"]\n{objective}{edge % shown}\n\n'
        for job, shown in (("resnet/full", '"net-b3/dcl"'), ("net-b3/full", '"resnet/dcl"'))
    )
    message = refusal(load_text, small.replace('[overrides."net-b3/dcl"]', tables + '[overrides."net-b3/dcl"]'))
    assert "jobs need each other in a circle" in message
    circle = message.split("circle: ")[1].split("\n")[0].rstrip(".").split(" > ")
    assert circle[0] == circle[-1]
    assert set(circle) == {"resnet/full", "resnet/dcl", "net-b3/full", "net-b3/dcl"}


@pytest.mark.parametrize(
    ("settings", "at", "says"),
    [
        (('start = "bbn"',), 'start = "bbn"', 'stages.more.start: the network of "net-b3/bbn" has 2 branches, not 1'),
        (
            ('soup = { of = ["full", "bbn"] }',),
            "soup",
            'stages.more.soup.of: the network of "net-b3/bbn" has 2 branches, not 1',
        ),
        (
            ('soup = { of = ["full", "dcl"] }', 'objective = "bbn"'),
            "soup",
            'the network of "net-b3/full" has 1 branches, not 2',
        ),
        (
            ('start = "centres"',),
            'start = "centres"',
            'of "net-b3/centres" has 3 centres of a class, not 1',
        ),
    ],
)
def test_weights_of_more_branches_than_the_jobs_are_refused(
    load_text: Load, small: str, settings: tuple[str, ...], at: str, says: str
) -> None:
    bbn = '[stages.bbn]\nstart = "full"\nobjective = "bbn"\n\n'
    bbn += '[stages.centres]\nstart = "full"\nobjective = { name = "arcface", centres = 3 }\n\n[stages.more]'
    text = with_stage(small, *settings).replace("[stages.more]", bbn)
    text = text.replace('"dcl", "more"]', '"dcl", "bbn", "centres", "more"]')
    message = refusal(load_text, text)
    assert f"line {line(text, at)}" in message
    assert says in message
    assert "give both the same objective" in message


def test_branches_that_go_on_as_branches_fit(load_text: Load, small: str) -> None:
    text = with_stage(small, 'start = "full"', 'objective = "bbn"')
    longer = text.replace("[stages.more]", '[stages.again]\nstart = "more"\nobjective = "bbn"\n\n[stages.more]')
    plan = load_text(longer.replace('"dcl", "more"]', '"dcl", "more", "again"]'))
    assert plan.parents("net-b3/again") == ("net-b3/more",)


@pytest.mark.parametrize(
    ("old", "new", "at", "meant"),
    [
        ('net-b3 = ["full", "dcl"]', 'net-b3 = ["full", "dlc"]', "net-b3 = [", "dcl"),
        ('net-b3 = ["full", "dcl"]', 'net-b4 = ["full", "dcl"]', "net-b4 = [", "net-b3"),
    ],
)
def test_a_misspelt_name_in_jobs_leaves_what_says_it_right(
    load_text: Load, small: str, tmp_path: Path, old: str, new: str, at: str, meant: str
) -> None:
    taught = f'[stages.full]\n{DISTILLED}\nteachers = ["net-b3/dcl"]'
    text = small.replace(old, new).replace("[stages.full]", taught).replace('start = "full"\n', "")
    message = refusal(load_text, text)
    assert message.startswith(f"{tmp_path / 'plan.toml'}, line {line(text, at)}: "), "the one problem"
    assert f"Did you mean {meant}?" in message


def test_a_misspelt_member_is_compared_with_what_jobs_mean(load_text: Load, small: str) -> None:
    text = small.replace('net-b3 = ["full", "dcl"]', 'net-b3 = ["full", "dlc"]').replace(
        '"net-b3/dcl"', '"net-b3/dcll"'
    )
    message = refusal(load_text, text.replace('[overrides."net-b3/dcll"]', '[overrides."net-b3/dcl"]'))
    assert "Did you mean net-b3/dcl?" in message
    assert "net-b3/dlc" not in message


def test_what_does_nothing_is_said(load_text: Load, small: str) -> None:
    assert list(remarks(load_text(small))) == []
    late = load_text(
        small, ["stages.dcl.lr.milestones=[1,9]", "stages.full.lr.gamma=0.5", 'backbones.resnett="resnet18"']
    )
    assert list(remarks(late)) == [
        "backbones.resnett: no job is of it. Did you mean resnet?",
        "resnet/dcl: lr.milestones [1, 9] are never reached: epochs = 1.",
        "resnet/full, net-b3/full: lr.gamma does nothing without lr.milestones.",
        "net-b3/dcl: lr.milestones [9] are never reached: epochs = 4.",
    ]
