"""What a stage says, as frozen types.

The plan fills them (checked once, there); training and inference read them.
"""

from aliprod.recipe.job import (
    DEFAULT_MACHINE as DEFAULT_MACHINE,
    NO_INPUTS as NO_INPUTS,
    Inputs as Inputs,
    Machine as Machine,
    TrainingJob as TrainingJob,
    never as never,
    without_training as without_training,
)
from aliprod.recipe.settings import (
    PLAIN_NAME as PLAIN_NAME,
    Frozen as Frozen,
    LearningRate as LearningRate,
    Needs as Needs,
    Neighbours as Neighbours,
    ObjectiveRecipe as ObjectiveRecipe,
    OptimizerRecipe as OptimizerRecipe,
    PerClass as PerClass,
    PseudoLabels as PseudoLabels,
    Soup as Soup,
)
from aliprod.recipe.stage import (
    ADDED as ADDED,
    ADDED_BELOW as ADDED_BELOW,
    CROPS as CROPS,
    NO_COST as NO_COST,
    RECIPE_VERSION as RECIPE_VERSION,
    STATISTICS_BATCHES as STATISTICS_BATCHES,
    VIEWS as VIEWS,
    Augmentation as Augmentation,
    Part as Part,
    Stage as Stage,
    Views as Views,
)
