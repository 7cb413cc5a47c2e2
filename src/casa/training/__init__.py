"""Training: recipes as data, the stages of casa-tiny (text, tower, fusion), packing, and the run that joins them."""

from casa.training.loop import Progress
from casa.training.recipe import Recipe, load_recipe, parse_recipe
from casa.training.sources import Sources
from casa.training.train import STAGES, check_recipe, train

__all__ = ["STAGES", "Progress", "Recipe", "Sources", "check_recipe", "load_recipe", "parse_recipe", "train"]
