"""What a stage says, as frozen types.

The plan fills them (checked once, there); training and inference read them.
"""

from aliprod.recipe.job import (
    DEFAULT_MACHINE as DEFAULT_MACHINE,
)
from aliprod.recipe.job import (
    NO_INPUTS as NO_INPUTS,
)
from aliprod.recipe.job import (
    Inputs as Inputs,
)
from aliprod.recipe.job import (
    Machine as Machine,
)
from aliprod.recipe.job import (
    TrainingJob as TrainingJob,
)
from aliprod.recipe.job import (
    never as never,
)
from aliprod.recipe.job import (
    without_training as without_training,
)
from aliprod.recipe.settings import (
    PLAIN_NAME as PLAIN_NAME,
)
from aliprod.recipe.settings import (
    Frozen as Frozen,
)
from aliprod.recipe.settings import (
    LearningRate as LearningRate,
)
from aliprod.recipe.settings import (
    Needs as Needs,
)
from aliprod.recipe.settings import (
    Neighbours as Neighbours,
)
from aliprod.recipe.settings import (
    ObjectiveRecipe as ObjectiveRecipe,
)
from aliprod.recipe.settings import (
    OptimizerRecipe as OptimizerRecipe,
)
from aliprod.recipe.settings import (
    PerClass as PerClass,
)
from aliprod.recipe.settings import (
    PseudoLabels as PseudoLabels,
)
from aliprod.recipe.settings import (
    Soup as Soup,
)
from aliprod.recipe.stage import (
    ADDED as ADDED,
)
from aliprod.recipe.stage import (
    ADDED_BELOW as ADDED_BELOW,
)
from aliprod.recipe.stage import (
    CROPS as CROPS,
)
from aliprod.recipe.stage import (
    NO_COST as NO_COST,
)
from aliprod.recipe.stage import (
    RECIPE_VERSION as RECIPE_VERSION,
)
from aliprod.recipe.stage import (
    STATISTICS_BATCHES as STATISTICS_BATCHES,
)
from aliprod.recipe.stage import (
    VIEWS as VIEWS,
)
from aliprod.recipe.stage import (
    Augmentation as Augmentation,
)
from aliprod.recipe.stage import (
    Part as Part,
)
from aliprod.recipe.stage import (
    Stage as Stage,
)
from aliprod.recipe.stage import (
    Views as Views,
)
