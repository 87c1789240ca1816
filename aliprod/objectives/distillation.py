"""Knowledge distillation (Hinton et al. 2015): a student learns a teacher's whole distribution."""

from torch import Tensor, nn
from torch.nn import functional

from aliprod.objectives import Batch, Context, Model, Needs, Reduction, mean_over, precise, reduced, require


def loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, weight: float, reduction: Reduction = "mean"
) -> Tensor:
    """a T^2 KL(softmax(q/T) || softmax(s/T)) + (1 - a) CE(s, t), section 2 of the paper.

    Student s and teacher q (B, K) are logits; log-probabilities serve, -inf (a probability of 0) included. A weight a
    of 1 leaves KL T^2 alone, a mean over images, not over B K.
    """
    student = precise(student)
    softened = (student / temperature).log_softmax(dim=1)
    target = (precise(teacher) / temperature).softmax(dim=1).to(student.dtype)
    divergence = functional.kl_div(softened, target, reduction="none").sum(dim=1)  # 0 log 0 = 0
    hard = functional.cross_entropy(student, labels, reduction="none")
    return reduced(weight * temperature**2 * divergence + (1 - weight) * hard, reduction)


class Objective(nn.Module):
    """A student of the teachers that the stage names, by their mean probabilities of each image's centre crop."""

    needs = Needs(teacher=True)

    def __init__(self, context: Context, *, temperature: float = 2.0, weight: float = 0.7) -> None:  # noqa: ARG002
        super().__init__()
        require(temperature > 0, f"temperature = {temperature} is not positive.", "2 is the default.")
        require(0 <= weight <= 1, f"weight = {weight} is not in 0 to 1.", "0.7 is the default.")
        self.temperature, self.weight = temperature, weight

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        assert batch.teacher is not None  # noqa: S101  needed, so given
        student, teacher = model(batch.images), precise(batch.teacher).log()
        values = loss(student, teacher, batch.labels, self.temperature, self.weight, reduction="none")
        return {"distillation": mean_over(values, batch)}
