"""Scores: on offline tasks made by seed (pages, scenes, stream), and on questions and answers of one's own."""

from casa.evaluation.example import CELL, Example, QuestionAnswer, Split
from casa.evaluation.metrics import METRICS, Score
from casa.evaluation.offline_tasks import TASKS, check_tasks, evaluate
from casa.evaluation.pages import page
from casa.evaluation.questions import AnswerSettings, Question, read_questions
from casa.evaluation.scenes import scene
from casa.evaluation.scoring import RecordsFile, Summary, score_questions, summarise
from casa.evaluation.standard import STANDARD
from casa.evaluation.stream import StreamExample, stream, training_clip

__all__ = [
    "CELL",
    "METRICS",
    "STANDARD",
    "TASKS",
    "AnswerSettings",
    "Example",
    "Question",
    "QuestionAnswer",
    "RecordsFile",
    "Score",
    "Split",
    "StreamExample",
    "Summary",
    "check_tasks",
    "evaluate",
    "page",
    "read_questions",
    "scene",
    "score_questions",
    "stream",
    "summarise",
    "training_clip",
]
