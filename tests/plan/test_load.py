"""A plan is accepted whole or refused with every problem's file, line, key and nearest right name."""

import json
import resource
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aliprod.errors import Refused
from aliprod.plan.load import load
from aliprod.plan.schema import Plan

ROOT = Path(__file__).resolve().parents[2]


def refusal(load_text: Any, text: str, *sets: str) -> str:
    with pytest.raises(Refused) as caught:
        load_text(text, sets)
    assert caught.value.status == 2
    return str(caught.value)


def line(text: str, start: str) -> int:
    return 1 + next(number for number, line in enumerate(text.split("\n")) if line.startswith(start))


def test_the_seeds_plan_has_sixteen_trainings_and_eleven_members() -> None:
    plan = load(ROOT / "jobs" / "aliproducts.toml")
    assert len(list(plan.job_names())) == 16
    assert len(plan.ensemble.members) == 11


def test_a_small_plan_is_accepted(load_text: Any, small: str) -> None:
    assert load_text(small).name == "small"


@pytest.mark.parametrize(
    ("old", "new", "at", "says"),
    [
        (
            "epochs = 2",
            "epohcs = 2",
            "epohcs",
            "stages.full has no setting epohcs.|Did you mean epochs?|A stage may say",
        ),
        ("epochs = 2", "warmup_epochs = 1", "warmup_epochs", "Did you mean lr.warmup_epochs?"),
        ("epochs = 2", "epochs = true", "epochs = true", "stages.full.epochs = true must be a whole number"),
        ("epochs = 2", "epochs = 2.0", "epochs = 2.0", "stages.full.epochs = 2.0 must be a whole number"),
        ("epochs = 2", 'epochs = "2"', "epochs", 'stages.full.epochs = "2" must be a whole number'),
        ("epochs = 2", "epochs = 0", "epochs", "stages.full.epochs = 0 must be at least 1"),
        ("epochs = 2", "drop_rate = nan", "drop_rate", "stages.full.drop_rate is nan"),
        ("epochs = 2", "optimizer.weight_decay = inf", "optimizer.weight", "stages.full.optimizer.weight_decay is inf"),
        (
            "epochs = 2",
            "seed = 99999999999999999999",
            "seed = 999",
            "stages.full.seed is a whole number beyond 64 bits",
        ),
        ("epochs = 2", "epochs = 2024-01-01", "epochs = 2024", "stages.full.epochs is a date"),
        ("epochs = 2", "crop = 128", "[stages.full]", "stages.full: crop = 128 is larger than resize = 64"),
        ("epochs = 2", 'augmentation = ["flip"]', "[stages.full]", "stages.full: augmentation needs exactly one of"),
        ("epochs = 2", 'augmentation = ["flop"]', "augmentation", 'stages.full.augmentation.0 = "flop" must be'),
        ("epochs = 2", 'images = "some"', "images", 'stages.full.images = "some" must be "all" or a table'),
        ("epochs = 2", "scale = [0.5]", "scale", "stages.full.scale has too few values"),
        (
            "epochs = 2",
            "scale = [0.1, 0.5, 1.0]",
            "scale",
            "stages.full.scale = [0.1, 0.5, 1.0] must be a list of at most 2",
        ),
        (
            "per_class = 30",
            "per_clas = 30",
            "images",
            "stages.dcl.images has no setting per_clas.|Did you mean per_class?",
        ),
        ("per_class = 30", "per_class = 0", "images", "stages.dcl.images.per_class = 0 must be at least 1"),
        ('"dcl", parts', '"dlc", parts', 'objective = { name = "dlc', 'no objective "dlc".|Did you mean dcl?'),
        ("parts = 2", "part = 2", 'objective = { name = "dcl', "dcl has no option part.|Did you mean parts?"),
        ("parts = 2", "parts = 2.5", 'objective = { name = "dcl', "objective.parts = 2.5 must be a whole number"),
        ("parts = 2", "parts = true", 'objective = { name = "dcl', "objective.parts = true must be a whole number"),
        (
            "parts = 2",
            "parts = 3",
            "[stages.dcl]",
            "stages.dcl: crop = 64 gives 2 cells a side, no multiple of parts = 3",
        ),
        ('start = "full"', 'start = "ful"', "start", 'stages.dcl.start: there is no stage "ful".|Did you mean full?'),
        ('start = "full"', 'start = "dcl"', "start", "stages.dcl.start: stages need each other in a circle"),
        ("momentum = 0.8", "momentun = 0.8", "optimizer", "defaults.optimizer has no setting momentun.|Did you mean"),
        ("momentum = 0.8", "momentum = 1", "optimizer", "defaults.optimizer.momentum = 1 must be less than 1"),
        ("[overrides.net-b3]", "[overrides.net-b4]", "[overrides.net-b4]", '"net-b4" is neither|Did you mean net-b3?'),
        ("epochs = 4", "crop = 256", '[overrides."net-b3/dcl"]', 'overrides."net-b3/dcl": crop = 256 is larger than'),
        (
            'resnet = ["dcl", "full"]',
            'resnet = ["dcl"]',
            "resnet = [",
            '"dcl" starts from "full", which is not in the list',
        ),
        ('resnet = ["dcl"', 'resnet = ["dlc"', "resnet = [", 'jobs.resnet: there is no stage "dlc".|Did you mean dcl?'),
        ('resnet = ["dcl"', 'resnet = ["full", "dcl"', "resnet = [", 'jobs.resnet says "full" 2 times'),
        ('resnet = ["dcl", "full"]', "resnet = []", "resnet = [", "jobs.resnet = [] must be a list of at least 1"),
        ('net-b3 = ["full"', 'net-b4 = ["full"', "net-b4 = [", 'there is no backbone "net-b4".|Did you mean net-b3?'),
        (
            '"resnet/full",',
            '"resnet/fulll",',
            '    "resnet/fulll"',
            'member "resnet/fulll" is not a job|Did you mean resnet/full?',
        ),
        ('"net-b3/dcl",', '"resnet/full",', '    "resnet/full"', 'member "resnet/full" stands there 2 times'),
        ('"net-b3/dcl",', "3,", "members", "ensemble.members.1 = 3 must be a string"),
        ("ranks = 2", "ranks = 4", "[stages.full]", "ranks = 4 is more than shares = 2|say shares = 4, or"),
        ("ranks = 2", "ranks = [4, 8]", "[stages.full]", "ranks = [4, 8] is more than shares = 2|say shares = 4, or"),
        ("ranks = 2", "ranks = [2, 1]", "[stages.full]", "ranks = [2, 1] is upside down"),
        ("ranks = 2", "ranks = [1, 2, 3]", "ranks", "cluster.ranks = [1, 2, 3] must be"),
        ("shares = 2", "shares = 3", "[stages.full]", "shares = 3 is no power of two"),
        ("shares = 2", "shares = 4\nbatch_size = 6", "[stages.full]", "batch_size = 6 cannot be dealt to 4 shares"),
        (
            'name = "dcl", parts = 2',
            'name = "lio", positives = 4',
            "[stages.dcl]",
            "batch_size = 256 cannot be dealt to 2 shares in groups of 5 images of one class; a multiple of 10 can",
        ),
        (
            "shares = 2",
            'shares = "ranks"\nbatch_size = 7',
            "[stages.full]",
            "batch_size = 7 cannot be dealt to 2 shares",
        ),
        (
            "ranks = 2",
            "ranks = { 'net-b3/dlc' = 2 }",
            "ranks",
            '"net-b3/dlc" is neither a backbone nor a job|Did you mean net-b3/dcl?',
        ),
        ("ranks = 2", "rank = 2", "rank", "cluster has no setting rank.|Did you mean ranks?"),
        (
            '"net-b3/dcl",\n]',
            '"net-b3/dcl",\n]\ncombine = "weight"',
            "combine =",
            'ensemble.combine = "weight" must be "sum", "greedy" or "weights".|Did you mean weights?',
        ),
        ("ranks = 2", "use_gpu = 1", "use_gpu", 'cluster.use_gpu = 1 must be "auto" or true or false'),
        ("format = 1", "format = 2", "format", "format = 2 must be 1"),
        ('name = "small"', 'name = "../up"', "name", "name: it becomes a folder"),
        ('resnet = "resnet50', '"a b" = "resnet50', '"a b"', 'backbones."a b": it becomes a folder'),
        ("[stages.full]", '[stages."full\\n"]', '[stages."full', "it becomes a folder"),
        ('path = "pictures"', "", "[catalogue]", "catalogue: a catalogue has a path, or synth"),
        (
            'path = "pictures"',
            "synth = { classes = 1, images = 9 }",
            "synth",
            "catalogue.synth.classes = 1 must be at least 2",
        ),
        (
            "[ensemble]",
            "[enssemble]",
            "[enssemble]",
            "a plan has no setting enssemble.|Did you mean ensemble?|lacks ensemble",
        ),
        ("[cluster]", "cluster", "cluster", "this is no TOML"),
    ],
)
def test_what_is_wrong_is_said_with_line_key_and_nearest_name(
    load_text: Any, small: str, tmp_path: Path, old: str, new: str, at: str, says: str
) -> None:
    text = small.replace(old, new, 1)
    assert text != small
    message = refusal(load_text, text)
    assert f"{tmp_path / 'plan.toml'}, line {line(text, at)}" in message
    for words in says.split("|"):
        assert words in message


def test_no_members_is_refused(load_text: Any, small: str) -> None:
    assert "members = [] must be a list of at least 1" in refusal(load_text, small, "ensemble.members=[]")


def test_ranks_that_results_depend_on_must_be_said(load_text: Any, small: str) -> None:
    text = small.replace("shares = 2", 'shares = "ranks"').replace("ranks = 2", 'ranks = "auto"')
    assert "say how many, [cluster] ranks = 2" in refusal(load_text, text)


def test_all_problems_are_found_at_once(load_text: Any, small: str) -> None:
    text = small.replace("ranks", "rank").replace("epochs = 2", "epohcs = 2").replace('"net-b3/dcl",', '"net-b3/dlc",')
    message = refusal(load_text, text)
    assert "3 problems" in message
    assert all(words in message for words in ("no setting rank.", "no setting epohcs.", 'member "net-b3/dlc"'))


def test_at_most_twenty_problems_are_listed(load_text: Any, small: str) -> None:
    wrong = "".join(f"x{number} = 1\n" for number in range(50))
    message = refusal(load_text, small.replace("epochs = 2\n", wrong))
    assert message.count("has no setting") == 20
    assert "more than 20 problems" in message


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("stages.full.epohcs=4", "Did you mean epochs?"),
        ("stages.full.epochs=0", "must be at least 1"),
        ("stage.full.epochs=4", "a plan has no setting stage.|Did you mean stages?"),
        ("stages.full.epochs.x=4", "stages.full.epochs is no table"),
        ("stages.full.epochs", "--set takes KEY=VALUE"),
        ("=4", "--set takes KEY=VALUE"),
        ("stages..epochs=4", "--set takes KEY=VALUE"),
        ("stages.full.lr={", "this is no TOML"),
        ("a.b.c.d.e.f.g.h.i.j.k=1", "no setting lies 11 tables deep"),
        ("stages.full.drop_rate=nan", "is nan"),
        ("stages.full.crop=128", "crop = 128 is larger than resize = 64"),
    ],
)
def test_a_wrong_flag_is_named(load_text: Any, small: str, tmp_path: Path, flag: str, says: str) -> None:
    message = refusal(load_text, small, flag)
    assert str(tmp_path / "plan.toml") in message
    assert f"--set {flag}" in message
    assert all(words in message for words in says.split("|"))


@pytest.mark.parametrize("flag", ["stages.full.epochs=4\nseed=3", "name=\udc80", "name=a\0b", "\x1b[2J=1"])
def test_a_flag_that_cannot_be_printed_is_refused_without_printing_it(load_text: Any, small: str, flag: str) -> None:
    message = refusal(load_text, small, flag)
    assert "printable characters only" in message
    assert message.isprintable()


def test_flags_override_the_file_and_the_last_one_counts(load_text: Any, small: str) -> None:
    flags = ["stages.full.epochs=5", "stages.full.epochs=6", "stages.dcl.lr.heads=1", 'overrides."resnet/full".ema=0.5']
    plan = load_text(small, flags)
    assert plan.stage("resnet/full").epochs == 6
    assert plan.stage("resnet/full").ema == 0.5
    assert plan.stage("resnet/dcl").lr.heads == 1.0


def test_a_bare_word_of_a_flag_is_a_string(load_text: Any, small: str) -> None:
    assert load_text(small, ["name=other"]).name == "other"
    assert (
        load_text(small, ["cluster.tracking_uri=http://127.0.0.1:5000"]).cluster.tracking_uri == "http://127.0.0.1:5000"
    )
    assert load_text(small, ["stages.full.objective=focal"]).stage("resnet/full").objective.name == "focal"


def test_a_flag_may_reach_into_an_objective_that_is_given_by_name(load_text: Any, small: str) -> None:
    plan = load_text(small, ["stages.full.objective=focal", "stages.full.objective.gamma=3"])
    assert plan.stage("resnet/full").objective.options == {"gamma": 3.0}


def test_paths_of_the_file_count_from_it_and_those_of_flags_from_here(
    load_text: Any, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    plan = load_text(small.replace("pretrained = true", 'pretrained = "weights"'), ["catalogue.path=mine"])
    assert plan.catalogue.path == str(here / "mine")
    assert plan.cluster.storage == str(tmp_path / "results")
    assert plan.stage("resnet/full").pretrained == str(tmp_path / "weights")
    assert load_text(small, ["cluster.storage=s3://bucket/runs"]).cluster.storage == "s3://bucket/runs"


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"none\.toml: the plan cannot be read: No such file"):
        load(tmp_path / "none.toml")
    with pytest.raises(Refused, match="Is a directory"):
        load(tmp_path)
    with pytest.raises(Refused, match="null byte"):
        load(tmp_path / "a\0b")


def test_a_byte_order_mark_and_windows_lines_are_fine(small: str, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_bytes(b"\xef\xbb\xbf" + small.replace("\n", "\r\n").encode())
    assert load(tmp_path / "plan.toml").name == "small"


BOMBS = {
    "one key of 100,000 parts": b"a." * 100_000 + b"b = 1",
    "many keys of 49 parts": b"".join(b"x%d." % number + b"a." * 48 + b"b = 1\n" for number in range(2_300)),
    "many tables of ten parts": b"".join(b"[x%d." % number + b"a." * 9 + b"b]\n" for number in range(9_000)),
    "lists in lists": b"a = " + b"[" * 100_000,
    "lists in lists, closed": b"a = " + b"[" * 200 + b"]" * 200,
    "many unknown settings": b"".join(b"a%d = 1\n" % number for number in range(25_000)),
    "many stages": b"stages = {" + b",".join(b"a%d = {}" % number for number in range(20_000)) + b"}",
    "a number of 200,000 digits": b"a = " + b"9" * 200_000,
    "no UTF-8": b'name = "\xff\xfe"',
    "larger than a plan may be": b"# " + b"x" * 256_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_little_memory_and_time(tmp_path: Path, name: str) -> None:
    (tmp_path / "plan.toml").write_bytes(BOMBS[name])
    program = (
        "import sys, pathlib, aliprod.plan.load as p\n"
        "try: p.load(pathlib.Path(sys.argv[1]))\n"
        "except p.Refused as e: print(e)"
    )
    limits = ((resource.RLIMIT_AS, (400 << 20,) * 2), (resource.RLIMIT_CPU, (5, 5)))
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "plan.toml")],
        preexec_fn=lambda: [resource.setrlimit(*limit) for limit in limits],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(tmp_path / "plan.toml"))


def test_plans_are_read_without_torch_timm_ray_or_mlflow() -> None:
    heavy = ["torch", "torchvision", "timm", "ray", "mlflow", "numpy"]
    program = (
        "import sys, json, pathlib, aliprod.plan.jobs, aliprod.plan.load as p\n"
        "p.load(pathlib.Path(sys.argv[1]))\n"
        "print(json.dumps([m for m in json.loads(sys.argv[2]) if m in sys.modules]))"
    )
    command = [sys.executable, "-c", program, str(ROOT / "jobs" / "aliproducts.toml"), json.dumps(heavy)]
    assert json.loads(subprocess.check_output(command)) == []


# One mutation of a valid plan ------------------------------------------------------------------------------------


def outcome(file: Path, *sets: str) -> Plan | Refused:
    try:
        return load(file, sets)
    except Refused as refused:
        return refused


DATA = tomllib.loads((ROOT / "jobs" / "aliproducts.toml").read_text(encoding="utf-8"))


def leaves(table: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in table.items():
        found.append((*above, name))
        found += leaves(value, (*above, name)) if isinstance(value, dict) else []
    return found


def written(value: Any) -> str:
    """A value in TOML; inline tables, so that any key can stand anywhere."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted(key)} = {written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return quoted(value) if isinstance(value, str) else str(value).lower()


def quoted(text: str) -> str:
    return json.dumps(text).replace("\x7f", "\\u007f")


def escapes_are_whole(text: str) -> bool:
    return all(ord(character) < 0x10000 for character in text)  # json writes the rest as pairs, which TOML forbids


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(escapes_are_whole)
scalars = st.one_of(st.integers(), st.floats(), st.booleans(), words, st.sampled_from(["full", "dcl", "resnet50/lio"]))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=5
)


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """The seed's plan with one setting replaced, renamed, removed or added."""
    data = json.loads(json.dumps(DATA))
    path = draw(st.sampled_from(leaves(DATA)))
    table = data
    for name in path[:-1]:
        table = table[name]
    match draw(st.sampled_from(["replace", "rename", "remove", "add"])):
        case "replace":
            table[path[-1]] = draw(values)
        case "rename":
            table[draw(words)] = table.pop(path[-1])
        case "remove":
            del table[path[-1]]
        case "add":
            table[draw(words | st.sampled_from(["seed", "start", "name", "objective", "images"]))] = draw(values)
    return data


@settings(max_examples=400, deadline=2_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(data={**DATA, "stages": {**DATA["stages"], "full": {"objective": {"name": "antigravity.x"}}}})
@example(data={**DATA, "jobs": {"/": ["full"]}})
@example(data={**DATA, "": 2**63})
@given(mutated())
def test_a_mutated_plan_is_a_plan_or_refused_by_file_and_key(tmp_path: Path, data: dict[str, Any]) -> None:
    file = tmp_path / "plan.toml"
    file.write_text("\n".join(f"{quoted(key)} = {written(value)}" for key, value in data.items()), encoding="utf-8")
    result = outcome(file)
    says = str(result).replace(str(file), "")
    assert isinstance(result, Plan) or any(name in says for name in [*Plan.model_fields, "member", "a plan"])
    assert isinstance(result, Plan) or str(file) in str(result)


@settings(max_examples=200, deadline=2_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.text(), st.builds("{}={}".format, st.sampled_from([".".join(path) for path in leaves(DATA)]), st.text())
    )
)
def test_any_flag_gives_a_plan_or_is_refused(flag: str) -> None:
    result = outcome(ROOT / "jobs" / "aliproducts.toml", flag)
    assert (
        isinstance(result, Plan) or "aliproducts.toml, --set" in str(result) or "aliproducts.toml, line" in str(result)
    )


@settings(max_examples=200, deadline=2_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 5_000), piece=st.binary(max_size=8))
def test_a_damaged_file_gives_a_plan_or_is_refused(tmp_path: Path, position: int, piece: bytes) -> None:
    content = (ROOT / "jobs" / "aliproducts.toml").read_bytes()
    (tmp_path / "plan.toml").write_bytes(content[:position] + piece + content[position + len(piece) :])
    result = outcome(tmp_path / "plan.toml")
    assert isinstance(result, Plan) or "plan.toml" in str(result)


def test_a_flag_for_a_stage_that_is_not_there_is_refused() -> None:
    with pytest.raises(Refused) as refused:
        load(ROOT / "jobs" / "quickstart.toml", ["stages.ful.epochs=2"])
    assert "no stage" in str(refused.value)
    assert "Did you mean full?" in str(refused.value)
