"""The runner with models that know everything, nothing, or half."""

import pytest

from casa.errors import UserError
from casa.evaluation import offline_tasks
from casa.evaluation.example import generator
from casa.evaluation.metrics import words
from casa.evaluation.offline_tasks import check_tasks, evaluate, held_out
from casa.evaluation.stream import stream

SEED, LIMIT = 5, 10


class Silent:
    def step(self, frame):
        return ""


def silent(images, questions):
    return [""] * len(questions)


def oracle():
    """Answers by looking the picture up among the examples that the seed must give."""
    known = {}
    for example in [*held_out("pages", SEED, LIMIT), *held_out("scenes", SEED, LIMIT)]:
        for turn in example.turns:
            known[example.image.tobytes(), turn.question] = turn.answer
    return lambda images, questions: [
        known[image.tobytes(), question] for image, question in zip(images, questions, strict=True)
    ]


def oracle_sessions():
    """Sessions that know the captions of the streams, in order."""
    made = 0

    class Oracle:
        def __init__(self):
            nonlocal made
            made += 1
            example = stream(generator("stream", "held_out", SEED, made), "held_out", seconds=20)
            self.captions = iter(example.captions())
            self.frames = example.frames()

        def step(self, frame):
            assert frame.tobytes() == next(self.frames).tobytes()
            return next(self.captions)

    return Oracle


@pytest.mark.slow
def test_an_oracle_scores_full_marks():
    scores = evaluate(["pages", "scenes", "stream"], oracle(), oracle_sessions(), seed=SEED, limit=LIMIT)
    assert scores == {
        "pages": {"digits": 1.0, "lines": 1.0, "n": LIMIT},
        "scenes": {"accuracy": 1.0, "n": LIMIT},
        "stream": {"wer": 0.0, "n": LIMIT},
    }


def test_a_silent_model_scores_nothing():
    scores = evaluate(["stream", "pages", "scenes"], silent, Silent, seed=SEED, limit=3)
    assert list(scores) == ["stream", "pages", "scenes"]
    assert scores["stream"] == {"wer": 1.0, "n": 3}
    assert scores["pages"] == {"digits": 0.0, "lines": 0.0, "n": 3}
    assert scores["scenes"] == {"accuracy": 0.0, "n": 3}


def test_digits_and_lines_are_scored_apart():
    truth = oracle()

    def reads_digits_only(images, questions):
        answers = truth(images, questions)
        return [a if q.startswith("What") else "?" for a, q in zip(answers, questions, strict=True)]

    scores = evaluate(["pages"], reads_digits_only, Silent, seed=SEED, limit=LIMIT)
    assert scores["pages"] == {"digits": 1.0, "lines": 0.0, "n": LIMIT}


def test_every_page_brings_one_question_of_each_kind():
    for example in held_out("pages", 0, 5):
        assert [turn.kind for turn in example.turns] == ["line", "digit"]


@pytest.mark.slow
def test_pictures_can_be_smaller():
    seen = {"pages": [], "scenes": [], "stream": []}

    class Watching(Silent):
        def step(self, frame):
            seen["stream"].append(frame.size)
            return ""

    for task in ("pages", "scenes"):

        def noted(images, questions, task=task):
            seen[task] += [image.size for image in images]
            return silent(images, questions)

        evaluate([task], noted, Silent, limit=40, largest=168)
    evaluate(["stream"], silent, Watching, limit=3, largest=168)
    for task in ("pages", "scenes"):
        assert (min(map(min, seen[task])), max(map(max, seen[task]))) == (112, 168)
    # a frame has at least 224 px
    assert set(seen["stream"]) == {(224, 224)}
    assert max(max(page.image.size) for page in held_out("pages", SEED, 40)) > 448
    # what is larger than any picture of a task changes nothing
    for task in ("pages", "scenes"):
        pair = zip(held_out(task, SEED, 4, 9000), held_out(task, SEED, 4), strict=True)
        assert all(one.image.tobytes() == other.image.tobytes() for one, other in pair)
    with pytest.raises(UserError, match="The largest picture is 96 px; it must be 112 or more"):
        evaluate(["pages"], silent, Silent, largest=96)


def test_evaluations_with_other_seeds_share_no_page():
    pages = [page.image.tobytes() for seed in (0, 1, -1) for page in held_out("pages", seed, 4)]
    assert len(set(pages)) == len(pages)


def test_batches_are_never_larger_than_said_and_lose_nothing():
    sizes = []

    def counting(images, questions):
        sizes.append(len(images))
        return [""] * len(images)

    evaluate(["pages"], counting, Silent, limit=19)
    assert sizes == [offline_tasks.BATCH, offline_tasks.BATCH, 6]


def test_streams_are_cut_where_the_limit_is_reached():
    captions = ["", "40", "", "71", "", "3", ""]
    assert offline_tasks._until(captions, 2) == ["", "40", "", "71", ""]
    assert offline_tasks._until(captions, 3) == captions
    assert words(offline_tasks._until(captions, 1)) == ["40"]


def test_progress_is_told():
    told = []
    evaluate(["scenes"], silent, Silent, limit=2, progress=lambda *told_now: told.append(told_now))
    assert told == [("scenes", 1, 2), ("scenes", 2, 2)]


def test_a_model_that_drops_answers_is_found_out():
    with pytest.raises(ValueError, match="2 questions were asked, 1 answers"):
        evaluate(["pages"], lambda images, questions: questions[1:], Silent, limit=1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["page"], "did you mean 'pages'"),
        (["pages", "chess"], "choose from pages, scenes, stream"),
        ([], "No task was named"),
    ],
)
def test_unknown_tasks_are_refused_before_anything_runs(names, message):
    with pytest.raises(UserError, match=message):
        evaluate(names, silent, Silent)


def test_names_are_cleaned_and_kept_in_order():
    assert check_tasks([" stream", "pages ", "stream"]) == ["stream", "pages"]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(UserError, match="1 or more"):
        evaluate(["pages"], silent, Silent, limit=limit)


def test_what_tasks_are_drawn_from_is_tried_without_a_model():
    offline_tasks.draw_one(["pages", "scenes", "stream"], largest=112)
