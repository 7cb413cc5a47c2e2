"""What `casa train` measures with the offline tasks while it trains: training itself knows no evaluation."""

from typing import Any

from casa.training.own.recipe import EvaluationSettings
from casa.training.seen import Evaluate


def scores_of(settings: EvaluationSettings) -> Evaluate:
    """A function from a model and its processor to scores such as `pages_digits`.

    Raises UserError for a task that is not known, or that cannot be drawn here.
    """
    from casa.evaluation.answering import answerer
    from casa.evaluation.runner import check_tasks, draw_one, evaluate
    from casa.streaming import StreamingSession

    names = check_tasks(settings.tasks)
    # what they are drawn from is an extra, and would be missed at the first measurement only
    draw_one(names, settings.largest)

    def scores(model: Any, processor: Any) -> dict[str, float]:
        found = evaluate(
            names,
            answerer(model, processor),
            lambda: StreamingSession(model, processor),
            limit=settings.limit,
            largest=settings.largest,
        )
        return {
            f"{task}_{name}": value for task, values in found.items() for name, value in values.items() if name != "n"
        }

    return scores
