"""A plan beside its catalogue, without it, and beside something that is none."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from aliprod.build.target import Site
from aliprod.catalogue import sources
from aliprod.errors import Refused
from aliprod.plan.jobs import jobs_of
from aliprod.plan.open import Request, open_plan
from aliprod.plan.places import resolve
from aliprod.plan.schema import Plan
from aliprod.store.layout import key_of


@pytest.fixture
def opened(load_text: Callable[..., Plan], small: str, tmp_path: Path) -> Callable[..., Request]:
    """A request for the small plan, its own weights replaced by none."""

    def request(text: str = small) -> Request:
        plan = load_text(text)
        return Request(plan, text, resolve(plan, tmp_path / "runs", None, None))

    return request


def test_without_its_catalogue_a_plan_has_jobs_without_keys_and_says_so(opened: Callable[..., Request]) -> None:
    found = open_plan(opened())
    jobs, note = found.jobs, found.note
    assert list(jobs) == ["resnet/full", "resnet/dcl", "net-b3/full", "net-b3/dcl"]
    assert {job.key for job in jobs.values()} == {None}
    assert "pictures" in note
    assert "`run` would refuse" in note


def test_a_catalogue_that_is_to_be_rendered_is_not_missed(opened: Callable[..., Request], small: str) -> None:
    note = open_plan(opened(small.replace('path = "pictures"', "synth = { classes = 2, images = 9 }"))).note
    assert "the first run renders it" in note


def test_beside_its_catalogue_every_job_has_the_key_of_that_catalogue(
    opened: Callable[..., Request], shared: Path, tmp_path: Path
) -> None:
    shutil.copytree(shared / "data" / "tiny", tmp_path / "pictures")
    request = opened()
    found = open_plan(request)
    jobs, note = found.jobs, found.note
    assert note == ""
    assert jobs == jobs_of(request.plan, sources.read(shared / "data" / "tiny").fingerprint)
    assert len({job.key for job in jobs.values()} - {None}) == len(jobs)


def test_what_is_there_and_no_catalogue_is_refused(opened: Callable[..., Request], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(Refused, match="holds no catalogue") as refused:
        open_plan(opened())
    assert refused.value.where == str(tmp_path / "pictures")
    (tmp_path / "pictures").rmdir()
    (tmp_path / "pictures").write_text("a file")
    with pytest.raises(Refused, match="is a file, not the folder of a catalogue"):
        open_plan(opened())


def test_what_a_plan_says_of_its_catalogue_is_how_every_process_reads_it(
    opened: Callable[..., Request], small: str, tmp_path: Path
) -> None:
    for name in ("store", "pictures"):
        (tmp_path / name).mkdir()
    for label in "ab":
        (tmp_path / "store" / label).mkdir()
        (tmp_path / "pictures" / label).symlink_to(tmp_path / "store" / label)
        for number in range(10):
            Image.effect_noise((32, 32), 20 + number).save(tmp_path / "store" / label / f"{number}.png")
    with pytest.raises(Refused, match="no row"):
        open_plan(opened())
    said = 'path = "pictures"\nlinks = "store"\nval = 0.2\nseed = 3'
    found = open_plan(opened(small.replace('path = "pictures"', said)))
    catalogue = found.read_catalogue()
    assert (len(catalogue.train), len(catalogue.val)) == (16, 4)
    assert len(list((tmp_path / "runs" / "held-out").iterdir())) == 1
    assert Site.of(found).read().fingerprint == catalogue.fingerprint
    assert found.plan.digest != opened().plan.digest


def test_what_a_plan_does_not_say_of_its_catalogue_is_no_part_of_its_digest(
    load_text: Callable[..., Plan], small: str
) -> None:
    plan = load_text(small)
    said = {"path": plan.catalogue.path, "synth": None}
    unsaid = {"cluster": True, "tune": True, "catalogue": True, "ensemble": {"combine"}}
    dumped = plan.model_dump(mode="json", exclude=unsaid) | {"catalogue": said}
    assert plan.digest == key_of(dumped), "as before columns, val, seed, links and combine were settings"
    assert load_text(small, ['ensemble.combine="greedy"']).digest != plan.digest
