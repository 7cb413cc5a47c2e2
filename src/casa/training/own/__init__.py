"""Training on one's own data: a recipe as plain values, the model it names, a plan of the run, and the run.

recipe = open_recipe("recipes/lora-own-data.yaml", ["optimisation.steps=2000"])
folder = train_run(recipe, "runs/mine", evaluate=None)
"""

from casa.training.own.reading import open_recipe
from casa.training.own.recipe import RunRecipe, parse_run_recipe, run_recipe_values
from casa.training.own.run import train_run

__all__ = ["RunRecipe", "open_recipe", "parse_run_recipe", "run_recipe_values", "train_run"]
