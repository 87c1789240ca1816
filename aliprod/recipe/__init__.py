"""What a stage says, as frozen types.

The plan fills them (checked once, there); training and inference read them.
"""

from aliprod.recipe.settings import (
    PLAIN_NAME,
    Frozen,
    LearningRate,
    Needs,
    Neighbours,
    ObjectiveRecipe,
    OptimizerRecipe,
    PerClass,
    PseudoLabels,
    Soup,
)
from aliprod.recipe.stage import (
    ADDED,
    ADDED_BELOW,
    CROPS,
    NO_COST,
    RECIPE_VERSION,
    STATISTICS_BATCHES,
    VIEWS,
    Augmentation,
    Part,
    Stage,
    Views,
)
from aliprod.recipe.work import (
    DEFAULT_MACHINE,
    NO_INPUTS,
    Inputs,
    Machine,
    TrainingJob,
    never,
    without_training,
)

__all__ = [
    "ADDED",
    "ADDED_BELOW",
    "CROPS",
    "DEFAULT_MACHINE",
    "NO_COST",
    "NO_INPUTS",
    "PLAIN_NAME",
    "RECIPE_VERSION",
    "STATISTICS_BATCHES",
    "VIEWS",
    "Augmentation",
    "Frozen",
    "Inputs",
    "LearningRate",
    "Machine",
    "Needs",
    "Neighbours",
    "ObjectiveRecipe",
    "OptimizerRecipe",
    "Part",
    "PerClass",
    "PseudoLabels",
    "Soup",
    "Stage",
    "TrainingJob",
    "Views",
    "never",
    "without_training",
]
