"""From a source to captions on disk: what `casa caption` does, for programs too."""

from casa.captioning.ending import Ending
from casa.captioning.questions import Question, parse_question
from casa.captioning.request import Request, parse_option
from casa.captioning.run import Report, caption

__all__ = ["Ending", "Question", "Report", "Request", "caption", "parse_option", "parse_question"]
