"""sizes: what the table says of a network is what the network itself says."""

import subprocess
import sys

import pytest

from aliprod.errors import Refused
from aliprod.models.classifier import _made, check_network, own_size
from aliprod.plan.networks import misfit, stride


@pytest.mark.parametrize(
    ("network", "crop", "fits"),
    [
        ("resnet50.tv_in1k", 100, True),
        ("efficientnet_b3", 300, True),
        ("vit_tiny_patch16_224", 100, True),
        ("swin_tiny_patch4_window7_224", 96, True),
        ("inception_v3", 64, False),
        ("inception_v3", 96, True),
        ("gcvit_xxtiny", 100, False),
        ("gcvit_xxtiny", 64, True),
        ("crossvit_tiny_240", 224, False),
        ("crossvit_tiny_240", 240, True),
    ],
)
def test_the_table_and_the_network_agree(network: str, crop: int, fits: bool) -> None:
    assert bool(_made(network, crop)) is fits
    assert bool(misfit(network, crop)) is not fits


@pytest.mark.parametrize("network", ["resnet50", "vit_tiny_patch16_224", "beit_base_patch16_224", "crossvit_tiny_240"])
def test_a_stride_of_the_table_is_that_of_the_map(network: str) -> None:
    made = _made(network, own_size(network))
    assert made is not None
    assert stride(network) == (own_size(network) / made.side if made.side else 0)


def test_sizes_near_the_one_that_does_not_fit_are_named_and_fit() -> None:
    said = misfit("gcvit_xxtiny.in1k", 100)
    assert said == "gcvit_xxtiny.in1k takes no images of 100 x 100 pixels; crop = 96 or 128 would fit"
    assert _made("gcvit_xxtiny", 96)
    assert _made("gcvit_xxtiny", 128)


def test_the_encoder_of_another_model_is_no_classifier() -> None:
    said = "qwen3_vit_88m_enc pools no features for a classifier"
    assert misfit("qwen3_vit_88m_enc", 224).startswith(said)
    with pytest.raises(Refused, match=said):
        check_network("qwen3_vit_88m_enc", "backbones.qwen", 224)


def test_nothing_is_said_of_networks_that_the_table_has_not() -> None:
    assert misfit("a_network_of_next_year", 97) == ""
    assert stride("a_network_of_next_year") is None


def test_the_table_is_read_without_torch() -> None:
    code = (
        "import sys; from aliprod.plan.networks import misfit; misfit('resnet50', 7); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
