"""The benchmarks that papers of this field report, by name: where they lie, how they ask, and how they are scored.

Prompts, splits and rules are those of lmms-eval, by which the paper measured (section "Evaluation"), with each set's
fields as its public card has them. A table; what a set does that others do not is a small function beside it.
"""

import json
import re
import string
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from casa.data.record import BadRecord
from casa.data.settings import SourceSettings
from casa.errors import UserError
from casa.evaluation.metrics import METRICS, Score, choice_of, options_of
from casa.evaluation.questions import AdaptedRow, rows_of
from casa.evaluation.scoring import Line, Scorer, by_metric
from casa.settings import near

Row = Mapping[str, Any]

PHRASE = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
MAX_FRAMES = 64  # of a film, unless asked otherwise
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class StandardTask:
    """One benchmark.

    Attributes:
        hub, subsets, split: Where it lies.
        ask: A row (and its subset) to what is shown, asked and accepted.
        metric: The name of its score.
        prompt: Stands on a line of its own behind the question. max_new_tokens: of the longest answer.
        keep: Fields of a row that stand in the records.
        by: The field by which scores are told apart.
        combine: Further scores, from the lines' scores and rows.
        beside: The subset that has the pictures, which rows name in `imageId`.
    """

    name: str
    hub: str
    split: str
    ask: Callable[[Row, str], AdaptedRow]
    metric: str
    scorer: Scorer
    prompt: str = ""
    max_new_tokens: int = 16
    subsets: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    by: str = ""
    combine: Callable[[Sequence[tuple[Score, Row]]], dict[str, float]] | None = None
    beside: str = ""

    def sources(self, data: str | None, changes: Mapping[str, Any]) -> list[SourceSettings]:
        """Its sources: on the hub, or in a folder or file at `data`. changes: to settings of each."""
        given = {"fps": 1.0, "max_frames": MAX_FRAMES, **changes}
        return [
            SourceSettings(self._path(data, subset), split=self.split, subset=subset or None, **given)
            for subset in self.subsets or ("",)
        ]

    def _path(self, data: str | None, subset: str) -> str:
        """Where a subset lies: in a copy of the hub's repository, a folder that `save_to_disk` wrote, or a file."""
        if data is None or data.startswith("hub:"):
            return data or f"hub:{self.hub}"
        path = Path(data).expanduser()
        path = path / self.name if (path / self.name).is_dir() else path
        for inner in (path / subset, path / f"{subset}.json", path / "json" / f"{subset}.json"):
            if subset and inner.exists():
                path = inner
                break
        shards = f"{self.split}-*.parquet"
        return str(path / "**" / shards) if path.is_dir() and any(path.rglob(shards)) else str(path)

    def adapt(self, data: str | None, suffix: str = "") -> Callable[[Row, str], AdaptedRow]:
        """What makes questions of its rows. suffix: in place of the prompt."""
        pictures: dict[str, Any] = {}
        if self.beside:
            source = SourceSettings(self._path(data, self.beside), split=self.split, subset=self.beside)
            for row in rows_of([source]):
                if isinstance(row[1].value, Mapping):
                    pictures[row[1].value["id"]] = row[1].value["image"]
        prompt = suffix or self.prompt

        def adapted(row: Row, subset: str) -> AdaptedRow:
            if self.beside:
                if (picture := pictures.get(row["imageId"])) is None:
                    raise BadRecord("missing-picture", f"{self.beside} has no picture {row['imageId']}.")
                row = {**row, "image": picture}
            found = self.ask(row, subset)
            return replace(found, question=found.question + (f"\n{prompt}" if prompt else ""))

        return adapted

    def scores(self, found: Sequence[tuple[Score, Row]]) -> dict[str, float]:
        """Scores by `by`, and those of `combine`."""
        told = {f"{self.metric}_{name}": _mean(scores) for name, scores in _groups(found, self.by)} if self.by else {}
        return told | (self.combine(found) if self.combine is not None else {})


def _mean(scores: Iterable[Score]) -> float:
    scores = list(scores)
    return sum(score.points for score in scores) / sum(score.of for score in scores)


def _groups(found: Sequence[tuple[Score, Row]], field: str) -> list[tuple[str, list[Score]]]:
    groups: dict[str, list[Score]] = defaultdict(list)
    for score, row in found:
        groups[str(row.get(field)).lower().replace(" ", "_")].append(score)
    return sorted(groups.items())


def _picture(row: Row, question: str, references: Iterable[str]) -> AdaptedRow:
    return AdaptedRow([{"type": "image", "image": row["image"]}], question, tuple(references))


def _film(path: str, question: str, answer: str, row: Row | None = None) -> AdaptedRow:
    part = {"type": "video", "video": path}
    if row is not None and row.get("start") is not None and row.get("end") is not None:
        part |= {"video_start": float(row["start"]), "video_end": float(row["end"])}
    return AdaptedRow([part], question, (answer,))


def _listed(options: Iterable[str], form: str = "{}. {}") -> str:
    return "\n".join(form.format(letter, option) for letter, option in zip(LETTERS, options, strict=False))


def _question(row: Row, _: str) -> AdaptedRow:
    accepted = row["answers"] if "answers" in row else row["answer"]
    return _picture(row, row["question"].strip(), [accepted] if isinstance(accepted, str) else accepted)


def _textvqa(row: Row, _: str) -> AdaptedRow:
    return _picture(row, row["question"].capitalize(), row["answers"])


def _ai2d(row: Row, _: str) -> AdaptedRow:
    return _picture(row, f"{row['question']}\n{_listed(row['options'])}", LETTERS[int(row["answer"])])


def _mme(row: Row, _: str) -> AdaptedRow:
    return _picture(row, row["question"].strip().replace(" Please answer yes or no.", ""), [row["answer"]])


def _videomme(row: Row, _: str) -> AdaptedRow:
    asked = (
        "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
        "Respond with only the letter (A, B, C, or D) of the correct option.\n"
    )
    # its options have their letters
    question = "\n".join([row["question"], *row["options"]])
    return _film(f"{row['videoID']}.mp4", f"{asked}{question}\n", row["answer"])


# where the films of MVBench's tasks lie in its folder
MVBENCH: dict[str, str] = json.loads(Path(__file__).with_name("mvbench.json").read_text(encoding="utf-8"))


def _mvbench(row: Row, subset: str) -> AdaptedRow:
    options, folder = row["candidates"], MVBENCH[subset]
    question = f"Question:{row['question']}\nOption:\n{_listed(options, '({}) {}')}"
    # clips that are cut already begin at 0
    times = None if folder.endswith("segment") else row
    return _film(f"{folder}/{row['video']}", question, LETTERS[options.index(row["answer"])], times)


def _nextqa(row: Row, _: str) -> AdaptedRow:
    question = f"{row['question'].strip()}\n{_listed(row[f'a{number}'].strip() for number in range(5))}"
    return _film(f"{row['video']}.mp4", question, LETTERS[int(row["answer"])])


def _perceptiontest(row: Row, _: str) -> AdaptedRow:
    question = f"{row['question']}\n{_listed(row['options'])}"
    return _film(f"{row['video_name']}.mp4", question, LETTERS[int(row["answer_id"])])


def _mlvu(row: Row, _: str) -> AdaptedRow:
    return _film(row["video_name"], row["question"], row["answer"])


def _ocr(line: Line) -> Score:
    """Whether a reference stands in the answer; blanks do not count in formulas (HME100k), and case only there."""
    formula = line.get("row", {}).get("dataset") == "HME100k"

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else _narrow(text).lower()

    return Score(float(any(plain(reference) in plain(line["answer"]) for reference in line["references"])))


def _narrow(text: str) -> str:
    """Full-width letters and marks as ASCII."""
    wide = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
    return text.translate(wide)


def _choice_or_words(line: Line) -> Score:
    """RealWorldQA: an option's letter where one is asked for, else the same words."""
    wanted = line["references"][0].strip()
    if wanted.upper() in ("A", "B", "C", "D"):
        return Score(float(choice_of(line["answer"], options_of(line["question"])) == wanted.upper()))
    return Score(float(line["answer"].lower().strip().rstrip(".") == wanted.lower()))


def _without_marks(line: Line) -> Score:
    """GQA: the same but for case and punctuation."""
    plain = [text.lower().translate(str.maketrans("", "", string.punctuation)) for text in line["references"]]
    return Score(float(line["answer"].lower().translate(str.maketrans("", "", string.punctuation)) in plain))


def _yes_no(line: Line) -> Score:
    """MME: whether yes or no stands among the first four characters."""
    given, wanted = (text.lower().strip().replace(".", "") for text in (line["answer"], line["references"][0]))
    said = {"y": "yes", "n": "no"}.get(given) or next((word for word in ("yes", "no") if word in given[:4]), "other")
    return Score(float(said == wanted))


COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def _mme_scores(found: Sequence[tuple[Score, Row]]) -> dict[str, float]:
    """perception (of 2,000) and cognition (of 800): by category, the share of right answers and that of pictures with
    both questions right, in percent."""
    categories: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for score, row in found:
        categories[row["category"]][row["question_id"]].append(score.points)
    told = {"mme_perception": 0.0, "mme_cognition": 0.0}
    for category, pictures in categories.items():
        each = [100 * sum(right) / len(right) + 100 * (len(right) == sum(right) == 2) for right in pictures.values()]
        told["mme_cognition" if category in COGNITION else "mme_perception"] += sum(each) / len(each)
    return told


def _mean_over(field: str, name: str) -> Callable[[Sequence[tuple[Score, Row]]], dict[str, float]]:
    """The mean of the groups' scores, however many questions each has."""

    def combined(found: Sequence[tuple[Score, Row]]) -> dict[str, float]:
        each = [_mean(scores) for _, scores in _groups(found, field)]
        return {name: sum(each) / len(each)}

    return combined


def _choice(line: Line) -> Score:
    """A letter in any usual form, or the text of its option; a letter that is left open, as in "(B" too."""
    answer = re.sub(r"^\s*\(?([A-H])\)?\s*$", r"\1", line["answer"])
    return METRICS["mcq"](answer, line["references"], line["question"])


_TASKS = (
    StandardTask(
        *("chartqa", "lmms-lab-encoder/ChartQA", "test", _question, "relaxed", by_metric("relaxed")),
        prompt="Answer the question with a single word.",
        keep=("type",),
        by="type",
    ),
    StandardTask(
        *("docvqa", "lmms-lab-encoder/DocVQA", "validation", _question, "anls", by_metric("anls"), PHRASE, 32),
        subsets=("DocVQA",),
        keep=("questionId",),
    ),
    StandardTask(
        *("infovqa", "lmms-lab-encoder/DocVQA", "validation", _question, "anls", by_metric("anls"), PHRASE, 32),
        subsets=("InfographicVQA",),
        keep=("questionId",),
    ),
    StandardTask(
        *("ocrbench", "echo840/OCRBench", "test", _question, "ocrbench", _ocr),
        max_new_tokens=128,
        keep=("dataset", "question_type"),
        by="question_type",
    ),
    StandardTask(
        *("textvqa", "lmms-lab-encoder/textvqa", "validation", _textvqa, "vqa", by_metric("vqa"), PHRASE, 32),
        keep=("question_id",),
    ),
    StandardTask("realworldqa", "lmms-lab-encoder/RealWorldQA", "test", _question, "exact", _choice_or_words),
    StandardTask("ai2d", "lmms-lab-encoder/ai2d", "test", _ai2d, "mcq", _choice, LETTER),
    StandardTask(
        *("gqa", "lmms-lab-encoder/GQA", "testdev", _question, "exact", _without_marks, PHRASE),
        subsets=("testdev_balanced_instructions",),
        keep=("id",),
        beside="testdev_balanced_images",
    ),
    StandardTask(
        *("mme", "lmms-lab-encoder/MME", "test", _mme, "accuracy", _yes_no, PHRASE),
        keep=("question_id", "category"),
        by="category",
        combine=_mme_scores,
    ),
    StandardTask(
        *("videomme", "lmms-eval/Video-MME", "test", _videomme, "mcq", _choice, LETTER),
        subsets=("videomme",),
        keep=("question_id", "duration", "task_type"),
        by="duration",
    ),
    StandardTask(
        *("mvbench", "OpenGVLab/MVBench", "train", _mvbench, "mcq", _choice, "Only give the best option.\n"),
        subsets=tuple(MVBENCH),
        keep=("task",),
        by="task",
        combine=_mean_over("task", "mcq_mean"),
    ),
    StandardTask(
        *("nextqa", "lmms-eval/NExTQA", "test", _nextqa, "mcq", _choice),
        subsets=("MC",),
        keep=("qid", "type"),
        by="type",
    ),
    StandardTask(
        *("perceptiontest", "lmms-eval/PerceptionTest_Val", "validation", _perceptiontest, "mcq", _choice, LETTER),
        subsets=("mc_question_val",),
        keep=("question_id", "area"),
        by="area",
    ),
    StandardTask(
        *("mlvu", "sy1998/MLVU_dev", "test", _mlvu, "mcq", _choice, "Only give the best option.\nBest option: ("),
        keep=("task_type",),
        by="task_type",
        combine=_mean_over("task_type", "mcq_mean"),
    ),
)
STANDARD = {task.name: task for task in _TASKS}


def check_standard(name: str) -> StandardTask:
    """The benchmark of that name. UserError for none."""
    if name not in STANDARD:
        raise UserError(f"There is no task {name!r}; {near(name, STANDARD, 'choose from')}")
    return STANDARD[name]
