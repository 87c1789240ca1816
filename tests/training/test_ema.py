"""ema: the golden averages, one weight at a time and for a whole model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from aliprod.training.ema import Average, update


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    with np.load(shared / "golden" / "ema.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def test_the_average_is_the_golden_one_with_and_without_warm_up(golden: dict[str, torch.Tensor]) -> None:
    decay = float(golden["decay"])
    plain = warmed = golden["weights"][0]
    for step, weights in enumerate(golden["weights"]):
        if step:
            plain, warmed = update(plain, weights, decay), update(warmed, weights, decay, step)
        torch.testing.assert_close(plain, golden["ema"][step], rtol=0, atol=1e-12)
        torch.testing.assert_close(warmed, golden["ema_warmup"][step], rtol=0, atol=1e-12)


def test_a_models_average_is_the_golden_one_of_each_parameter(golden: dict[str, torch.Tensor]) -> None:
    model = nn.Linear(1, 5, dtype=torch.float64)
    set_weights(model, golden["weights"][0])
    average = Average(model, float(golden["decay"]))
    for step, weights in enumerate(golden["weights"][1:], 1):
        set_weights(model, weights)
        average.update(model, step)
        for tensor in average.state(model).values():
            torch.testing.assert_close(tensor.flatten(), golden["ema_warmup"][step], rtol=0, atol=1e-12)
    assert torch.equal(model.bias, golden["weights"][-1])  # the model itself is left alone


def set_weights(model: nn.Linear, weights: torch.Tensor) -> None:
    with torch.no_grad():
        model.weight.copy_(weights[:, None])
        model.bias.copy_(weights)


def test_norm_statistics_and_counters_are_copied_not_averaged() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    average = Average(model, 0.5)
    model.train()(torch.randn(8, 3, 5, 5))
    average.update(model, 1)
    state = average.state(model)
    assert state.keys() == model.state_dict().keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(state[name], buffer)
    assert int(state["1.num_batches_tracked"]) == 1


def test_an_average_comes_back_from_its_state_dict() -> None:
    model = nn.Linear(3, 2)
    average = Average(model, 0.9)
    set_weights_at_random(model)
    average.update(model, 1)
    saved = {name: tensor.clone() for name, tensor in average.state(model).items()}
    other = Average(model, 0.9)
    other.load(saved)
    set_weights_at_random(model)
    average.update(model, 2)
    other.update(model, 2)
    for mine, its in zip(average.parameters.values(), other.parameters.values(), strict=True):
        assert torch.equal(mine, its)


def set_weights_at_random(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
