"""Offline tasks made by seed (pages, scenes, stream), their metrics, and the runner that scores a model."""

from casa.evaluation.example import CELL, Example, QuestionAnswer, Split
from casa.evaluation.pages import page
from casa.evaluation.runner import TASKS, check_tasks, evaluate
from casa.evaluation.scenes import scene
from casa.evaluation.stream import StreamExample, stream, training_clip

__all__ = [
    "CELL",
    "TASKS",
    "Example",
    "QuestionAnswer",
    "Split",
    "StreamExample",
    "check_tasks",
    "evaluate",
    "page",
    "scene",
    "stream",
    "training_clip",
]
