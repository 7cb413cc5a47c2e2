"""Offline tasks made by seed (pages, scenes, stream), their metrics, and the runner that scores a model."""

from casa.evaluation.example import CELL, DENSE_CHANNELS, DenseTargets, Example, Split, Turn
from casa.evaluation.pages import page
from casa.evaluation.runner import TASKS, check_tasks, evaluate
from casa.evaluation.scenes import scene
from casa.evaluation.sheets import sheet
from casa.evaluation.stream import StreamExample, stream

__all__ = [
    "CELL",
    "DENSE_CHANNELS",
    "TASKS",
    "DenseTargets",
    "Example",
    "Split",
    "StreamExample",
    "Turn",
    "check_tasks",
    "evaluate",
    "page",
    "scene",
    "sheet",
    "stream",
]
