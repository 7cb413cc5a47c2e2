"""What is seen of a run: figures per second, progress, TensorBoard, scores now and then, the curve of its losses."""

from casa.training.curve import draw_curve
from casa.training.seen.evaluating import Evaluate, Evaluation
from casa.training.seen.measures import Measures
from casa.training.seen.progress import ProgressShown
from casa.training.seen.reporting import reporters

__all__ = ["Evaluate", "Evaluation", "Measures", "ProgressShown", "draw_curve", "reporters"]
