"""A model scored on a set of questions: one's own, or one of the benchmarks by name."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from casa.cluster import spread
from casa.data.settings import SourceSettings
from casa.errors import UserError
from casa.evaluation.answering import Answerer
from casa.evaluation.judge import Judge
from casa.evaluation.live_captions import LIVE_SCORERS, LiveSession, caption_live, live_line
from casa.evaluation.metrics import LIVE, Score, check_metrics
from casa.evaluation.questions import Adapt, AnswerSettings, Question, read_questions, shuffled_pictures
from casa.evaluation.scoring import (
    Line,
    OnProgress,
    RecordsFile,
    Scorer,
    Summary,
    ask,
    by_metric,
    score_questions,
    summarise,
)
from casa.evaluation.standard import check_standard
from casa.models import CasaForConditionalGeneration, CasaProcessor, ImageCache
from casa.settings import build, plain_values

Data: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | SourceSettings | Sequence[Data]"
"""A path, or the settings of a source, or several of them."""


SHUFFLED = "shuffled-images"  # the one ablation that changes the questions and not the model


class Evaluator:
    """Asks a model the questions of sets, and scores its answers.

    Args:
        model: In evaluation mode.
        processor: Its own.
        records: A .jsonl file for every question, its references, answer, scores and time.
        resume: Goes on with that file.
        seed: Of words that are drawn, and of resamples.
        limit: Rows that are read of every source; None reads all.
        progress: Is told the number of lines so far.
        image_cache: Where pictures are kept for other runs.
        ablate: Names of what is taken out of the model, which belong to the run. Under "shuffled-images" every question
            has the pictures of another record.
        make_session: Opens a live session with a prompt, for records of live captions.
        judge: Gives every answer a number from 0 to 1.
        around: Makes what stands around a run, such as that which takes these parts out.
        cluster: A Ray cluster whose workers answer, as for `casa.cluster.spread`; None answers here.
        load: Gives a worker of a cluster its model, which has an `evaluator` as this one's has.
        settings: Of `AnswerSettings`.

    Raises:
        UserError: A setting is out of range.
    """

    def __init__(
        self,
        model: CasaForConditionalGeneration,
        processor: CasaProcessor,
        *,
        records: str | os.PathLike[str] | None = None,
        resume: bool = False,
        seed: int = 0,
        limit: int | None = None,
        progress: OnProgress | None = None,
        image_cache: ImageCache | None = None,
        ablate: Sequence[str] = (),
        make_session: Callable[[str], LiveSession] | None = None,
        judge: Judge | None = None,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        cluster: str | None = None,
        load: Callable[[], Any] | None = None,
        **settings: Any,
    ) -> None:
        if cluster is not None and load is None:
            raise UserError(
                "workers of a cluster load the model themselves: give its name, or leave cluster out.", field="cluster"
            )
        if limit is not None and limit < 1:
            raise UserError(f"The limit is {limit}; it must be 1 or more.")
        self.model, self.processor = model, processor
        self._given = {**settings, "seed": seed}
        self.settings: AnswerSettings = build(AnswerSettings, self._given)
        self._records, self._resume, self._limit = records, resume, limit
        self._progress, self._cache = progress, image_cache
        self._ablate, self._around = list(ablate), around
        self._make_session, self._judge = make_session, judge
        self._cluster, self._load = cluster, load

    def on_data(self, data: Data, metrics: Sequence[str]) -> Summary:
        """Scores on questions of one's own, by metrics of `METRICS`. Raises UserError."""
        names = check_metrics(metrics)
        scorers = {name: by_metric(name) for name in names if name != LIVE}
        scorers |= LIVE_SCORERS if LIVE in names else {}
        return self._run(sources_of(data), scorers, self.settings, self._records)

    def on_task(
        self, name: str, data: str | None = None, changes: Mapping[str, Any] | None = None, alone: bool = True
    ) -> Summary:
        """Scores on a benchmark of `STANDARD`, as it is published.

        Args:
            name: The benchmark's.
            data: A copy of its set: a folder or a file. None reads the hub.
            changes: To the settings of its sources, such as {"root": "films"}.
            alone: Whether the file of records is this benchmark's; otherwise its name is put into the file's.

        Raises:
            UserError: There is no such benchmark, or its set cannot be opened.
        """
        task = check_standard(name)
        settings = self.settings
        if "max_new_tokens" not in self._given:
            settings = replace(settings, max_new_tokens=task.max_new_tokens)
        adapt = task.adapt(data, settings.suffix)
        records = self._records
        if records is not None and not alone:
            records = Path(records).with_suffix(f".{name}{Path(records).suffix}")
        found = self._run(
            task.sources(data, changes or {}), {task.metric: task.scorer}, settings, records, adapt, task.keep, name
        )
        good = (line for line in found.lines if "error" not in line)
        scored = [(score, line.get("row", {})) for line in good if (score := task.scorer(line)) is not None]
        return replace(found, more=task.scores(scored) if scored else {})

    def _run(
        self,
        sources: Sequence[SourceSettings],
        scorers: Mapping[str, Scorer],
        settings: AnswerSettings,
        records: str | os.PathLike[str] | None,
        adapt: Adapt | None = None,
        known: Sequence[str] = (),
        task: str | None = None,
    ) -> Summary:
        run = {
            "model": self.model.config.name_or_path,
            "task": task,
            "data": plain_values(tuple(sources)),
            "metrics": list(scorers),
            **plain_values(settings),
            "limit": self._limit,
            **({"ablate": self._ablate} if self._ablate else {}),
            **({"judge": self._judge.model} if self._judge is not None else {}),
        }
        if self._judge is not None:
            scorers = {**scorers, "judge": lambda line: Score(line["judge"])}
        answerer = Answerer(self.model, self.processor, settings, self._cache)
        suffix = settings.suffix if adapt is None else ""
        questions = read_questions(sources, suffix=suffix, adapt=adapt, limit=self._limit, known=known)
        if SHUFFLED in map(str.strip, self._ablate):
            questions = shuffled_pictures(questions)
        file = RecordsFile(records, run, self._resume)
        more: dict[str, Any] = {"watch": self._watch, "judge": self._judge, "progress": self._progress}
        if self._cluster is not None and self._load is not None:
            begin = partial(_working, self._load, settings, self._ablate)
            more["spread"] = partial(spread, begin=begin, cluster=self._cluster)
        with self._around():
            lines = score_questions(questions, answerer, scorers, file, **more)
        return summarise(lines, scorers, settings.seed)

    def work(self) -> Callable[[Sequence[Question]], Iterator[list[Line]]]:
        """What a worker of a cluster does: a batch of questions comes to its lines."""
        answerer = Answerer(self.model, self.processor, self.settings, self._cache)

        def answered(batch: Sequence[Question]) -> Iterator[list[Line]]:
            with self._around():
                yield ask(answerer, self._watch, batch)

        return answered

    def _watch(self, question: Question) -> Line:
        if self._make_session is None:
            raise UserError("records of live captions need a session to watch with; give make_session.")
        return live_line(question, caption_live(question, self._make_session))


def _working(load: Callable[[], Any], settings: AnswerSettings, ablate: Sequence[str]) -> Any:
    return load().evaluator(ablate=ablate, **vars(settings)).work()


def sources_of(data: Data) -> list[SourceSettings]:
    """The settings of each source."""
    if isinstance(data, SourceSettings):
        return [data]
    if isinstance(data, str | os.PathLike):
        return [SourceSettings(os.fspath(data))]
    if isinstance(data, Mapping):
        return [build(SourceSettings, data, "data")]
    return [source for one in data for source in sources_of(one)]
