"""Distillation: the student meets the teacher's distribution and the labels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from aliprod.objectives.distillation import loss


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 0, 1e-12), (torch.float32, 1e-4, 1e-6)])
@pytest.mark.parametrize(("temperature", "weight"), [(1, 0.5), (2, 0.9), (4, 0.7)])
def test_values_and_gradients_are_the_golden_ones(golden, temperature, weight, dtype, rtol, atol):
    vectors, case = golden("distillation"), f"T{temperature}_a{weight}"
    student, teacher = vectors["student"].to(dtype).requires_grad_(), vectors["teacher"].to(dtype)
    value = loss(student, teacher, vectors["targets"], temperature, weight)
    value.backward()
    torch.testing.assert_close(value, vectors[f"total_{case}"].to(dtype), rtol=rtol, atol=atol)
    torch.testing.assert_close(student.grad, vectors[f"grad_{case}"].to(dtype), rtol=rtol, atol=atol)
    alone = loss(student, teacher, vectors["targets"], temperature, 1.0)
    torch.testing.assert_close(alone, vectors[f"kl_T{temperature}"].to(dtype), rtol=rtol, atol=atol)


@given(st.floats(0.5, 10), st.floats(-5, 5), st.integers(0, 2**32 - 1))
def test_a_student_that_equals_its_teacher_but_for_a_shift_has_only_the_labels_to_learn(temperature, shift, seed):
    teacher = 3 * torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([0, 1, 2, 5])
    found = loss(teacher + shift, teacher, labels, temperature, 0.7)
    torch.testing.assert_close(found, 0.3 * cross_entropy(teacher, labels), rtol=1e-9, atol=1e-9)


@given(st.floats(0.25, 20), st.integers(0, 2**32 - 1))
def test_equal_logits_leave_nothing_to_learn_at_any_temperature(temperature, seed):
    teacher = 3 * torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher, torch.tensor([0, 1, 2, 5]), temperature, 1.0)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-13)


@given(st.floats(0.5, 10), st.integers(0, 2**32 - 1))
def test_the_divergence_is_never_negative(temperature, seed):
    logits = 3 * torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert (loss(*logits, torch.tensor([0, 1, 2, 5]), temperature, 1.0, "none") >= -1e-12).all()


def test_a_teacher_of_another_precision_changes_no_dtype():
    student, teacher = torch.zeros(1, 3), torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    assert loss(student, teacher, torch.tensor([0]), 2.0, 0.7).dtype == torch.float32


def test_a_teachers_probability_of_0_is_no_nan():
    student = torch.zeros(1, 3, requires_grad=True)
    value = loss(student, torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([0]), 1.0, 1.0)
    value.backward()
    assert value.item() == pytest.approx(torch.tensor(1.5).log().item())
    torch.testing.assert_close(student.grad, torch.tensor([[1 / 3 - 1 / 2, 1 / 3 - 1 / 2, 1 / 3]]))


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    teacher = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, torch.tensor([0, 3, 4]), 2.0, 0.7), student)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_ten_thousand_from_half_precision_stay_finite_and_float32(dtype):
    student = (1e4 * torch.tensor([[1, -1, 0], [-1, 1, 1]])).to(dtype).requires_grad_()
    each = loss(student, -student.detach(), torch.tensor([0, 0]), 2.0, 0.7, reduction="none")
    each.sum().backward()
    assert each.shape == (2,)
    assert each.dtype == torch.float32
    assert each.isfinite().all()
    assert student.grad.isfinite().all()
