"""draft: whatever photographs and machine there are, what is written is a plan."""

from hypothesis import given, settings
from hypothesis import strategies as st

from aliprod.catalogue.catalogue import Catalogue
from aliprod.plan.draft import Computer, Photographs, draft, look_at, plain
from aliprod.plan.load import load
from aliprod.plan.schema import Plan

counts = st.lists(st.integers(1, 100_000), min_size=2, max_size=40).map(tuple)
photographs = st.builds(
    lambda counts, val, test, side: Photographs(sum(counts), val, test, counts, side),
    counts,
    st.integers(0, 1000),
    st.integers(0, 1000),
    st.integers(0, 4000),
)
computers = st.builds(
    Computer, st.integers(1, 256), st.integers(0, 16), st.integers(4 * 10**9, 200 * 10**9), st.booleans()
)


def loaded(tmp_path_factory, text: str) -> Plan:  # type: ignore[no-untyped-def]
    file = tmp_path_factory.mktemp("drafts") / "plan.toml"
    file.write_text(text, encoding="utf-8")
    return load(file)


@settings(max_examples=50)
@given(photographs, computers, st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20))
def test_any_draft_is_a_plan_that_fits_what_it_was_drafted_from(  # type: ignore[no-untyped-def]
    tmp_path_factory, seen: Photographs, computer: Computer, folder: str
) -> None:
    reading = {"val": 0.2, "columns": {"class": folder + "x"}}
    plan = loaded(tmp_path_factory, draft(plain(folder), folder + "/photos", seen, computer, reading))
    assert plan.catalogue.val == 0.2
    assert plan.catalogue.columns == {"class": folder + "x"}
    for job in plan.job_names():
        stage = plan.stage(job)
        heavy = stage.features == "computed" and plan.stages["full"]["epochs"] >= 10
        assert ("auto_augment" in stage.augmentation) == heavy
        assert (stage.norm_statistics == "frozen") == (computer.online and seen.train < 100_000)
        assert stage.crop <= max(64, seen.short_side / 0.8)
        assert stage.batch_size <= max(8, seen.train // 8)
        assert stage.batch_size % stage.shares == 0
        assert stage.batch_size // stage.shares >= min(32, stage.batch_size)
    uneven = max(seen.counts) > 3 * sorted(seen.counts)[len(seen.counts) // 2]
    assert {member.split("/")[1] for member in plan.ensemble.members} == {"balanced" if uneven else "full"}
    probes = {job for job in plan.job_names() if job.endswith("/probe")}
    assert probes == ({f"{one}/probe" for one in plan.backbones} if computer.online else set())
    assert not probes & {*plan.ensemble.members}
    for job in probes:
        stage = plan.stage(job)
        assert (stage.trains, stage.features, stage.images, stage.shares) == ("classifier", "cached", "all", 1)
    assert (plan.cluster.use_gpu is False) == (computer.gpus == 0)


def test_photographs_are_counted_and_their_sizes_looked_at(packages: Catalogue) -> None:
    seen = look_at(packages)
    assert (seen.train, seen.val, seen.test) == tuple(map(len, packages.splits))
    assert seen.counts == tuple(packages.class_counts)
    assert seen.short_side > 64
