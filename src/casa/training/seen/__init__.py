"""What is seen of a run: figures per second, progress, TensorBoard, scores now and then, and the model card."""

from casa.training.seen.card import Facts, write_card
from casa.training.seen.curve import draw_curve
from casa.training.seen.evaluating import Evaluate, Evaluation
from casa.training.seen.measures import Measures
from casa.training.seen.progress import ProgressShown
from casa.training.seen.reporting import reporters

__all__ = ["Evaluate", "Evaluation", "Facts", "Measures", "ProgressShown", "draw_curve", "reporters", "write_card"]
