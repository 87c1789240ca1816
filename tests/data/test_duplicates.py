"""duplicates: the golden hashes, the definition of a group written out, and photographs that were saved again."""

import io
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn
from scipy.sparse.csgraph import connected_components

from aliprod.catalogue.alike import gray32
from aliprod.catalogue.catalogue import Integers
from aliprod.catalogue.decode import decode
from aliprod.catalogue.sources import read
from aliprod.data.duplicates import Rule, confirmed, dct_hash, groups, kept

THRESHOLD = 6
seeds = st.integers(0, 2**32 - 1)
rules = st.sampled_from(["drop", "majority"])
in_groups = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3)), max_size=60).map(
    lambda rows: np.array(rows, np.int64).reshape(-1, 2)
)


def by_definition(hashes: torch.Tensor, threshold: int) -> Integers:
    """All pairs, and scipy's components, each named by its lowest row."""
    ones = hashes.numpy().astype(np.float32)
    distance = ones @ (1 - ones.T) + (1 - ones) @ ones.T
    component = connected_components(distance <= threshold)[1]
    return np.unique(component, return_index=True)[1][component]


def crowd(seed: int, count: int, centres: int, flipped: float) -> torch.Tensor:
    """Hashes about a few centres, each bit flipped with a chance: between equal and random."""
    draw = np.random.default_rng(seed)
    bits = draw.integers(0, 2, (centres, 64), np.uint8)[draw.integers(0, centres, count)]
    return torch.from_numpy(bits ^ (draw.random((count, 64)) < flipped).astype(np.uint8))


def test_hashes_and_groups_equal_the_golden_ones(shared: Path) -> None:
    golden = np.load(shared / "golden" / "duplicates.npz")
    hashes = dct_hash(torch.from_numpy(golden["gray32"]))
    assert torch.equal(hashes, torch.from_numpy(golden["hash_bits"]))
    assert np.array_equal(groups(hashes, int(golden["threshold"])).numpy(), golden["group"])


@given(seeds)
def test_a_hash_is_scipys_dct_above_its_median(seed: int) -> None:
    gray = np.random.default_rng(seed).integers(0, 256, (3, 32, 32), np.uint8)
    low = dctn(gray.astype(np.float64), axes=(1, 2))[:, :8, :8].reshape(3, 64)
    expected = low > np.median(low, axis=1, keepdims=True)
    assert np.array_equal(dct_hash(torch.from_numpy(gray)).numpy(), expected)


@pytest.mark.parametrize("level", [1, 77, 254, 255])
def test_a_blank_picture_has_the_mean_alone_above_zero(level: int) -> None:
    blank = torch.full((1, 32, 32), level, dtype=torch.uint8)
    assert dct_hash(blank).nonzero().tolist() == [[0, 0]]


@given(seeds, st.integers(1, 80), st.integers(1, 6), st.floats(0, 0.5), st.sampled_from([0, 1, 2, 6, 12, 63, 64]))
def test_groups_are_the_components_of_all_near_pairs(
    seed: int, count: int, centres: int, flipped: float, threshold: int
) -> None:
    hashes = crowd(seed, count, centres, flipped)
    assert np.array_equal(groups(hashes, threshold).numpy(), by_definition(hashes, threshold))


@pytest.mark.parametrize(("threshold", "flipped"), [(1, 0.01), (4, 0.03), (6, 0.08)])
def test_groups_found_through_tables_are_those_of_all_pairs(threshold: int, flipped: float) -> None:
    hashes = torch.cat([crowd(1, 1000, 400, flipped), crowd(2, 1000, 1, flipped)])  # loose, and crowded
    assert np.array_equal(groups(hashes, threshold).numpy(), by_definition(hashes, threshold))


def test_every_near_pair_is_found_wherever_its_bits_differ() -> None:
    draw = np.random.default_rng(3)
    one = draw.integers(0, 2, (6000, 64), np.uint8)
    other = one.copy()
    flips = np.argsort(draw.random(one.shape), axis=1)[:, :THRESHOLD]
    np.put_along_axis(other, flips, 1 - np.take_along_axis(one, flips, axis=1), axis=1)
    found = groups(torch.from_numpy(np.concatenate([one, other])), THRESHOLD).numpy()
    assert np.array_equal(found[6000:], found[:6000])


def test_a_crowd_that_shares_half_its_bits_is_split_by_the_others() -> None:
    one = np.random.default_rng(4).integers(0, 2, (8_000, 64), np.uint8)
    one[:, ::2] = 1
    other = one.copy()
    other[:, 1:12:2] ^= 1
    found = groups(torch.from_numpy(np.concatenate([one, other])), THRESHOLD).numpy()
    assert np.array_equal(found[8_000:], found[:8_000])


@given(seeds, st.integers(1, 60), st.floats(0, 0.2))
def test_groups_do_not_hang_on_the_order(seed: int, count: int, flipped: float) -> None:
    hashes = crowd(seed, count, 4, flipped)
    mixed = np.random.default_rng(seed).permutation(count)
    straight, other = groups(hashes, THRESHOLD).numpy(), groups(hashes[mixed], THRESHOLD).numpy()
    assert np.array_equal(straight[mixed][:, None] == straight[mixed], other[:, None] == other)


def test_hashes_that_are_far_from_each_other_form_no_group() -> None:
    rows = np.array([[(row & column).bit_count() & 1 for column in range(64)] for row in range(64)], np.uint8)
    assert groups(torch.from_numpy(rows), 31).tolist() == list(range(64))  # a Hadamard code: all 32 apart
    assert groups(torch.from_numpy(rows), 32).tolist() == [0] * 64


def test_a_hundred_thousand_equal_hashes_are_one_group() -> None:
    hashes = torch.ones(100_001, 64, dtype=torch.uint8)
    hashes[50_000] = 0
    found = groups(hashes, THRESHOLD)
    assert found[50_000] == 50_000
    assert found.unique().tolist() == [0, 50_000]


def test_no_hashes_have_no_groups() -> None:
    nothing = dct_hash(torch.empty(0, 32, 32, dtype=torch.uint8))
    assert nothing.shape == (0, 64)
    assert groups(nothing, THRESHOLD).shape == (0,)


def test_a_photograph_saved_again_smaller_is_near_itself_and_far_from_the_others(shared: Path) -> None:
    train = read(shared / "data" / "tiny").train
    photographs = [decode(train.path(row)) for row in range(0, len(train), len(train) // 8)]
    again = [saved_again(photograph) for photograph in photographs]
    found = groups(
        dct_hash(torch.from_numpy(np.stack([gray32(image) for image in photographs + again]))), THRESHOLD
    ).numpy()
    assert np.array_equal(found[len(photographs) :], found[: len(photographs)])
    assert len(np.unique(found)) == len(photographs)


def saved_again(photograph: Image.Image) -> Image.Image:
    content = io.BytesIO()
    smaller = photograph.resize((photograph.width * 2 // 3, photograph.height * 2 // 3), Image.Resampling.BICUBIC)
    smaller.save(content, "JPEG", quality=60)
    return decode(content.getvalue())


def test_of_each_group_the_rule_keeps_what_it_believes() -> None:
    group = np.array([0, 0, 2, 3, 2, 2, 3, 7])
    labels = np.array([1, 1, 0, 0, 1, 1, 1, 2])
    assert kept(group, labels, "drop", least_images=0).tolist() == [0, 7]
    assert kept(group, labels, "majority", least_images=0).tolist() == [0, 4, 7]  # 0 against 1 in group 3: no majority


def test_a_class_below_the_floor_first_gets_back_what_nobody_disputes() -> None:
    group, labels = np.array([0, 0, 2, 2, 4, 4, 4]), np.array([0, 1, 0, 1, 0, 0, 0])
    assert kept(group, labels, "drop", least_images=3).tolist() == [1, 3, 4, 5, 6]
    assert kept(group, labels, "drop", least_images=4).tolist() == [0, 1, 3, 4, 5, 6]


@given(in_groups, rules, st.integers(0, 8))
def test_no_class_falls_below_the_floor_or_what_it_had(rows: Integers, rule: Rule, least: int) -> None:
    group, labels = rows.T
    before, after = Counter(labels.tolist()), Counter(labels[kept(group, labels, rule, least_images=least)].tolist())
    assert all(after[label] >= min(count, least) for label, count in before.items())


@given(in_groups, rules)
def test_without_a_floor_a_group_keeps_one_image_or_none(rows: Integers, rule: Rule) -> None:
    group, labels = rows.T
    stay = set(kept(group, labels, rule, least_images=0).tolist())
    members = defaultdict(list)
    for row, number in enumerate(group.tolist()):
        members[number].append(row)
    for own in members.values():
        votes = Counter(labels[own].tolist()).most_common(2)
        believed = len(votes) == 1 or (rule == "majority" and votes[0][1] > votes[1][1])
        first = next(row for row in own if labels[row] == votes[0][0])
        assert stay & set(own) == ({first} if believed else set())


@given(in_groups, rules, seeds)
def test_with_ranks_what_stays_does_not_hang_on_the_order(rows: Integers, rule: Rule, seed: int) -> None:
    rank = np.arange(len(rows))
    mixed = np.random.default_rng(seed).permutation(len(rows))
    straight = kept(rows[:, 0], rows[:, 1], rule, rank=rank)
    other = kept(rows[mixed, 0], rows[mixed, 1], rule, rank=rank[mixed])
    assert np.array_equal(np.sort(mixed[other]), straight)


@given(in_groups, seeds, st.floats(0.5, 0.999))
def test_confirmed_groups_are_the_components_of_pairs_that_are_near_in_both(
    rows: Integers, seed: int, cosine: float
) -> None:
    draw = np.random.default_rng(seed)
    group = np.concatenate([[0], rows[:, 0]])
    embeddings = directions(seed, len(group))
    names = np.sort(draw.choice(1000, len(group), replace=False))
    near = (group[:, None] == group) & ((embeddings @ embeddings.T).numpy() >= cosine)
    component = connected_components(near)[1]
    expected = names[np.unique(component, return_index=True)[1][component]]
    assert np.array_equal(confirmed(group, names, embeddings, cosine), expected)


def directions(seed: int, count: int) -> torch.Tensor:
    """Unit vectors of a few directions with noise, so that some are near each other through others only."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 5, generator=generator)
    around = centres[torch.randint(4, (count,), generator=generator)] + 0.4 * torch.randn(count, 5, generator=generator)
    return torch.nn.functional.normalize(around, dim=1)


def test_a_chain_of_near_embeddings_is_one_group_and_leads_out_of_none() -> None:
    angles = torch.arange(30) * 0.1  # neighbours have a cosine of 0.995, the ends of -0.97
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    mixed = np.random.default_rng(0).permutation(30)
    assert confirmed(np.zeros(30, np.int64), np.arange(30) + 5, embeddings[mixed], 0.99).tolist() == [5] * 30
    apart = (np.arange(30) >= 15).astype(np.int64)  # the hashes see two groups
    assert confirmed(apart, np.arange(30), embeddings, 0.99).tolist() == [0] * 15 + [15] * 15


def test_an_image_without_any_feature_is_like_no_other() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert confirmed(np.zeros(4, np.int64), np.array([2, 3, 5, 8]), embeddings, 0.95).tolist() == [2, 3, 2, 8]


def test_the_teacher_keeps_the_label_whose_images_it_believes_most() -> None:
    group, labels = np.array([0, 0, 0, 3, 3, 5, 5]), np.array([1, 1, 0, 0, 1, 2, 2])
    belief = np.array([0.2, 0.4, 0.9, 0.5, 0.5, 0.0, 0.1])  # means of group 0: 0.9 for label 0, 0.3 for label 1
    assert kept(group, labels, "teacher", least_images=0, belief=belief).tolist() == [2, 5]
    assert kept(group, labels, "majority", least_images=0, belief=belief).tolist() == [0, 5]
    assert kept(group, labels, "drop", least_images=0, belief=belief).tolist() == [5]


@given(in_groups, seeds)
def test_the_teachers_choice_is_a_label_of_the_highest_mean_or_none(rows: Integers, seed: int) -> None:
    group, labels = rows.T
    belief = np.random.default_rng(seed).integers(0, 4, len(rows)) / 4
    stay = set(kept(group, labels, "teacher", least_images=0, belief=belief).tolist())
    for number in set(group.tolist()):
        own = np.flatnonzero(group == number)
        means = {label: belief[own][labels[own] == label].mean() for label in set(labels[own].tolist())}
        best = [label for label, mean in means.items() if mean == max(means.values())]
        expected = {next(row for row in own.tolist() if labels[row] == best[0])} if len(best) == 1 else set()
        assert stay & set(own.tolist()) == expected
