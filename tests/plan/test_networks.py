"""networks: plan knows timm's names without timm, and says all that is wrong at once."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import timm

from aliprod.errors import Refused
from aliprod.plan import networks
from aliprod.plan.schema import Plan

Load = Callable[..., Plan]


def refusal(load_text: Load, text: str, *sets: str) -> str:
    with pytest.raises(Refused) as caught:
        load_text(text, sets)
    assert caught.value.status == 2
    return str(caught.value)


def test_the_list_is_that_of_the_timm_that_is_installed() -> None:
    tagged = [name.partition(".")[::2] for name in timm.list_pretrained()]
    tags = {name: tuple(tag for of, tag in tagged if of == name) for name in timm.list_models()}
    listed = {name: found.tags for name, found in networks.known().items()}
    assert listed == tags, "python benchmarks/networks.py names"


def test_asking_it_imports_neither_timm_nor_torch() -> None:
    code = (
        "import sys; from aliprod.plan.networks import complaint\n"
        "assert complaint('resnet50.tv_in1k') == ('', '')\n"
        "assert 'resnet50' in complaint('resnet5O')[1]\n"
        "sys.exit(bool({'torch', 'timm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_networks_and_tags_are_named_with_their_lines_and_the_nearest_name(load_text: Load, small: str) -> None:
    text = small.replace('"efficientnet_b3.ra2_in1k"', '"efficientnet_bb3"')
    number = 1 + text.split("\n").index('net-b3 = "efficientnet_bb3"')
    said = refusal(load_text, text)
    assert f"line {number}: backbones.net-b3" in said
    assert 'has no network "efficientnet_bb3"' in said
    assert "efficientnet_b3" in said.partition("Did you mean")[2]
    assert 'no weights tagged "resnet50.tv_in2k"' in refusal(load_text, small, 'backbones.net-b3="resnet50.tv_in2k"')


def test_all_that_is_wrong_is_said_at_once(load_text: Load, small: str) -> None:
    wrong = ('backbones.net-b3="efficientnet_bb3"', "stages.full.crop=2000", "stages.dcl.epochz=3")
    said = refusal(load_text, small, *wrong, 'overrides."net-b3".lr.warmup_epochs=1000.0', "ensemble.viewz=1")
    assert all(what in said for what in ("efficientnet_bb3", "larger than resize", "epochz", "viewz")), said


def test_settings_that_do_nothing_are_refused(load_text: Load, small: str) -> None:
    said = refusal(load_text, small, 'stages.full.lr.schedule="cosine"', "stages.full.lr.milestones=[1]")
    assert "lr.milestones do nothing" in said
    assert "warmup_epochs = 9 is longer than the stage" in refusal(load_text, small, "stages.full.lr.warmup_epochs=9")


def test_a_network_without_pretrained_weights_is_refused_where_they_are_asked_for(load_text: Load, small: str) -> None:
    bare = next(name for name, found in networks.known().items() if not found.tags and name.startswith("resnet"))
    assert f"timm has no pretrained weights for {bare}" in refusal(load_text, small, f'backbones.resnet="{bare}"')
    load_text(small, [f'backbones.resnet="{bare}"', "defaults.pretrained=false"])
