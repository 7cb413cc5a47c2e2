# ruff: noqa: E501  prompts and rows as they are
"""Every benchmark on a small stand-in with the fields of its public card; prompts and scores written out by hand."""

import json

import datasets
import numpy as np
import pytest
from datasets import Features, Image, List, Value

from casa.errors import UserError
from casa.evaluation import evaluator
from casa.evaluation.evaluator import Evaluator
from casa.evaluation.standard import STANDARD, check_standard
from casa.media import VideoWriter
from casa.testing import tiny_casa, tiny_processor

TEXT, TEXTS, WHOLE, PICTURE = Value("string"), List(Value("string")), Value("int64"), Image()
PHRASE = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
OPTIONS = ["a cat", "a dog", "a bird"]

# name -> fields by the card; rows (pictures and shared fields are filled in); answers; first prompt; scores
CASES = {
    "chartqa": (
        {"type": TEXT, "question": TEXT, "answer": TEXT, "image": PICTURE},
        [
            {"type": "human_test", "question": "How many?", "answer": "100"},
            {"type": "human_test", "question": "What?", "answer": "Blue"},
            {"type": "augmented_test", "question": "Share?", "answer": "25%"},
        ],
        ["104", "Blue.", "0.25"],
        "How many?\nAnswer the question with a single word.",
        {"relaxed": 2 / 3, "relaxed_human_test": 0.5, "relaxed_augmented_test": 1.0},
    ),
    "docvqa": (
        {"questionId": TEXT, "question": TEXT, "question_types": TEXTS, "image": PICTURE, "docId": WHOLE,
         "ucsf_document_id": TEXT, "ucsf_document_page_no": TEXT, "answers": TEXTS, "data_split": TEXT},
        [
            {"questionId": "1", "question": "Which?", "answers": ["Coca Cola", "Coca Cola Company"]},
            {"questionId": "2", "question": "When?", "answers": ["1999"]},
        ],
        ["CocaCola", "2001"],
        f"Which?{PHRASE}",
        # of nine letters one is wrong; of four, all
        {"anls": (8 / 9) / 2},
    ),
    "infovqa": (
        {"questionId": TEXT, "question": TEXT, "answers": TEXTS, "answer_type": TEXTS, "image": PICTURE,
         "image_url": TEXT, "operation/reasoning": TEXTS, "ocr": TEXT, "data_split": TEXT},
        [{"questionId": "1", "question": "Who?", "answers": ["teachers"]}],
        ["Teacher"],
        f"Who?{PHRASE}",
        {"anls": 7 / 8},
    ),
    "ocrbench": (
        {"dataset": TEXT, "question": TEXT, "question_type": TEXT, "answer": TEXTS, "image": PICTURE},
        [
            {"dataset": "IIIT5k", "question": "what is written?", "question_type": "Regular Text Recognition",
             "answer": ["CENTRE"]},
            {"dataset": "HME100k", "question": "formula?", "question_type": "Handwritten Mathematical Expression "
             "Recognition", "answer": ["x ^ { 2 }"]},
            {"dataset": "HME100k", "question": "formula?", "question_type": "Handwritten Mathematical Expression "
             "Recognition", "answer": ["X + 1"]},
        ],
        ["It says Centre.", "x^{2}", "x+1"],
        "what is written?",
        {"ocrbench": 2 / 3, "ocrbench_regular_text_recognition": 1.0,
         "ocrbench_handwritten_mathematical_expression_recognition": 0.5},
    ),
    "textvqa": (
        {"image_id": TEXT, "question_id": Value("int32"), "question": TEXT, "question_tokens": TEXTS, "image": PICTURE,
         "image_width": Value("int32"), "image_height": Value("int32"), "flickr_original_url": TEXT,
         "flickr_300k_url": TEXT, "answers": TEXTS, "image_classes": TEXTS, "set_name": TEXT, "ocr_tokens": TEXTS},
        [
            {"question_id": 7, "question": "what brand is it? IBM?", "answers": ["dell"] * 9 + ["hp"]},
            {"question_id": 8, "question": "what?", "answers": ["red"] * 2 + ["a dark red"] * 8},
        ],
        ["Dell", "the red"],
        f"What brand is it? ibm?{PHRASE}",
        # two of ten see one other who said so, eight see two
        {"vqa": (1 + (2 * 1 / 3 + 8 * 2 / 3) / 10) / 2},
    ),
    "realworldqa": (
        {"image": PICTURE, "question": TEXT, "answer": TEXT, "image_path": TEXT},
        [
            {"question": "Which?\n\nA. Left\nB. Right\nPlease answer directly with only the letter of the correct option "
             "and nothing else.", "answer": "B"},
            {"question": "How many?", "answer": "3"},
            {"question": "How many?", "answer": "2"},
        ],
        ["(B)", "3.", "two"],
        "Which?\n\nA. Left\nB. Right\nPlease answer directly with only the letter of the correct option and nothing else.",
        {"exact": 2 / 3},
    ),
    "ai2d": (
        {"question": TEXT, "options": TEXTS, "answer": TEXT, "image": PICTURE},
        [
            {"question": "Which eats?", "options": OPTIONS, "answer": "1"},
            {"question": "Which flies?", "options": OPTIONS, "answer": "2"},
        ],
        ["B. a dog", "A"],
        f"Which eats?\nA. a cat\nB. a dog\nC. a bird{LETTER}",
        {"mcq": 0.5},
    ),
    "mme": (
        {"question_id": TEXT, "image": PICTURE, "question": TEXT, "answer": TEXT, "category": TEXT},
        [
            {"question_id": "1", "question": "Is it red? Please answer yes or no.", "answer": "Yes", "category": "color"},
            {"question_id": "1", "question": "Is it blue? Please answer yes or no.", "answer": "No", "category": "color"},
            {"question_id": "2", "question": "Is it red? Please answer yes or no.", "answer": "Yes", "category": "color"},
            {"question_id": "2", "question": "Is it blue? Please answer yes or no.", "answer": "No", "category": "color"},
            {"question_id": "3", "question": "Is 1 + 1 = 2?", "answer": "Yes", "category": "numerical_calculation"},
            {"question_id": "3", "question": "Is 1 + 1 = 3?", "answer": "No", "category": "numerical_calculation"},
        ],
        ["Yes, it is.", "no", "Yes.", "It is", "n", "N"],
        f"Is it red?{PHRASE}",
        # colours: 100 + 100 and 50 + 0, in the mean 125; numbers: 50 + 0
        {"accuracy": 4 / 6, "accuracy_color": 0.75, "accuracy_numerical_calculation": 0.5, "mme_perception": 125.0,
         "mme_cognition": 50.0},
    ),
    "videomme": (
        {"video_id": TEXT, "duration": TEXT, "domain": TEXT, "sub_category": TEXT, "url": TEXT, "videoID": TEXT,
         "question_id": TEXT, "task_type": TEXT, "question": TEXT, "options": TEXTS, "answer": TEXT},
        [
            {"duration": "short", "videoID": "clip", "question_id": "1-1", "task_type": "OCR Problems",
             "question": "Which?", "options": ["A. A cat.", "B. A dog.", "C. A bird.", "D. None."], "answer": "C"},
            {"duration": "long", "videoID": "clip", "question_id": "2-1", "task_type": "OCR Problems",
             "question": "Which?", "options": ["A. A cat.", "B. A dog.", "C. A bird.", "D. None."], "answer": "A"},
        ],
        ["The best answer is (C).", "D"],
        "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond "
        "with only the letter (A, B, C, or D) of the correct option.\nWhich?\nA. A cat.\nB. A dog.\nC. A bird.\nD. None.\n"
        f"{LETTER}",
        {"mcq": 0.5, "mcq_short": 1.0, "mcq_long": 0.0},
    ),
    "nextqa": (
        {"video": WHOLE, "frame_count": WHOLE, "width": WHOLE, "height": WHOLE, "question": TEXT, "answer": WHOLE,
         "qid": WHOLE, "type": TEXT, **{f"a{number}": TEXT for number in range(5)}},
        [
            {"video": 4010, "question": "why did he run", "answer": 4, "qid": 5, "type": "CW",
             **{f"a{number}": word for number, word in enumerate(["fun", "rain", "dog", "race", "late"])}},
        ],
        ["He was late"],
        "why did he run\nA. fun\nB. rain\nC. dog\nD. race\nE. late",
        {"mcq": 1.0, "mcq_cw": 1.0},
    ),
    "perceptiontest": (
        {"video_name": TEXT, "question": TEXT, "question_id": TEXT, "options": TEXTS, "answer_id": TEXT, "area": TEXT,
         "reasoning": TEXT, "tag": TEXTS},
        [
            {"video_name": "clip", "question": "Is it on?", "question_id": "0", "options": ["Yes", "No", "Unclear"],
             "answer_id": "2", "area": "physics"},
        ],
        ["C"],
        f"Is it on?\nA. Yes\nB. No\nC. Unclear{LETTER}",
        {"mcq": 1.0, "mcq_physics": 1.0},
    ),
    "mlvu": (
        {"video_name": TEXT, "duration": Value("float64"), "question": TEXT, "candidates": TEXTS, "answer": TEXT,
         "task_type": TEXT, "question_id": TEXT},
        [
            {"video_name": "clip.mp4", "question": "What?\n(A) a cat\n(B) a dog", "answer": "B", "task_type": kind}
            for kind in ("plotQA", "plotQA", "plotQA", "count")
        ],
        ["B)", "A", "a dog", "A"],
        "What?\n(A) a cat\n(B) a dog\nOnly give the best option.\nBest option: (",
        {"mcq": 0.5, "mcq_plotqa": 2 / 3, "mcq_count": 0.0, "mcq_mean": 1 / 3},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    for name in ("clip.mp4", "4010.mp4"):
        with VideoWriter(folder / name, (56, 56), fps=4) as film:
            for level in range(8):
                film.write(np.full((56, 56, 3), 30 * level, dtype=np.uint8))
    return folder


@pytest.fixture(scope="module")
def eyes():
    return tiny_casa(), tiny_processor()


def filled(features, row, number):
    """The row with something in every field of its card."""
    picture = np.full((28, 28, 3), 40 * number, dtype=np.uint8)
    empty = {"string": "", "int64": 0, "int32": 0, "float64": 0.0}
    found = {}
    for name, kind in features.items():
        default = picture if kind == PICTURE else [] if isinstance(kind, List) else empty[kind.dtype]
        found[name] = row.get(name, default)
    return found


def saved(folder, features, rows):
    whole = datasets.Dataset.from_list(
        [filled(features, row, number) for number, row in enumerate(rows)], features=Features(features)
    )
    whole.save_to_disk(folder)
    return folder


@pytest.fixture
def said(monkeypatch):
    """Puts answers into the model's mouth, by the questions' numbers, and notes the prompts."""
    prompts = {}

    def speak(answers):
        class Told:
            def __init__(self, *_):
                pass

            def batches(self, questions):
                return [list(questions)]

            def answer(self, questions):
                prompts.update({one.index: (one.text, len(one.pictures)) for one in questions})
                return [answers[one.index] for one in questions]

        monkeypatch.setattr(evaluator, "Answerer", Told)
        return prompts

    return speak


def scores_of(summary):
    left = ("_low", "_high")
    return {name: value for name, value in summary.scores().items() if not name.endswith(left)}


@pytest.mark.parametrize("name", CASES)
def test_scores_and_prompts_by_hand(name, tmp_path, films, eyes, said):
    features, rows, answers, prompt, scores = CASES[name]
    prompts = said(answers)
    path = saved(tmp_path / "set", features, rows)
    found = Evaluator(*eyes).on_task(name, str(path), {"root": str(films)})
    assert prompts[0][0] == prompt
    assert prompts[0][1] == (2 if "image" not in features else 1), "a film of two seconds is looked at each second"
    assert scores_of(found) == pytest.approx({**scores, "n": len(rows), "bad": 0})


@pytest.mark.parametrize("name", ["docvqa", "chartqa"])
def test_a_copy_of_the_hub_and_a_file_do_as_well(name, tmp_path, eyes, said):
    """Parquet in folders by subset and split, beside splits that are not asked for; that folder as a hub's; one file."""
    features, rows, answers, _, scores = CASES[name]
    said(answers)
    task = STANDARD[name]
    folder = tmp_path / name / (task.subsets[0] if task.subsets else "data")
    folder.mkdir(parents=True)
    for split in (task.split, "train"):
        whole = datasets.load_from_disk(saved(tmp_path / f"saved-{split}", features, rows))
        whole.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    file = folder / f"{task.split}-00000-of-00001.parquet"
    for data in (tmp_path, tmp_path / name, file):
        assert scores_of(Evaluator(*eyes).on_task(name, str(data))) == pytest.approx(
            {**scores, "n": len(rows), "bad": 0}
        )


def test_gqa_joins_its_pictures(tmp_path, eyes, said):
    prompts = said(["Left", "a dog"])
    asked = {"id": TEXT, "imageId": TEXT, "question": TEXT, "answer": TEXT, "fullAnswer": TEXT}
    rows = [
        {"id": "1", "imageId": "n1", "question": "Which side?", "answer": "left"},
        {"id": "2", "imageId": "n2", "question": "What?", "answer": "dog"},
        {"id": "3", "imageId": "n9", "question": "What?", "answer": "dog"},
    ]
    saved(tmp_path / "testdev_balanced_instructions", asked, rows)
    saved(tmp_path / "testdev_balanced_images", {"id": TEXT, "image": PICTURE}, [{"id": "n2"}, {"id": "n1"}])
    found = Evaluator(*eyes).on_task("gqa", str(tmp_path))
    assert prompts[0] == (f"Which side?{PHRASE}", 1)
    assert scores_of(found) == {"exact": 0.5, "n": 2, "bad": 1}
    assert "testdev_balanced_images has no picture n9" in found.named[0]


def test_mvbench_is_a_file_for_each_task(tmp_path, films, eyes, said):
    prompts = said(["(A)", "B", "(A) left"])
    (tmp_path / "json").mkdir()
    rows = {
        "moving_count": [{"video": "clip.mp4", "question": "How many?", "candidates": ["1", "2"], "answer": "1"}],
        "scene_transition": [
            {"video": "clip.mp4", "question": "Where to?", "candidates": ["left", "right"], "answer": answer,
             "start": 0.9, "end": 1.9} for answer in ("right", "right")
        ],
    }  # fmt: skip
    for task in STANDARD["mvbench"].subsets:
        (tmp_path / "json" / f"{task}.json").write_text(json.dumps(rows.get(task, [])))
    for folder in ("clevrer/video_validation", "scene_qa/video"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "clip.mp4").write_bytes((films / "clip.mp4").read_bytes())
    found = Evaluator(*eyes).on_task("mvbench", str(tmp_path), {"root": str(tmp_path)})
    assert prompts[0] == ("Question:How many?\nOption:\n(A) 1\n(B) 2\nOnly give the best option.\n", 2)
    assert prompts[1][1] == 1, "a second of the film"
    wanted = {"mcq": 2 / 3, "mcq_moving_count": 1, "mcq_scene_transition": 0.5, "mcq_mean": 0.75, "n": 3, "bad": 0}
    assert scores_of(found) == pytest.approx(wanted)


def test_rows_of_another_set_are_bad_records(tmp_path, eyes, said):
    said([])
    path = saved(tmp_path / "set", {"question": TEXT, "image": PICTURE}, [{"question": "What?"}])
    found = Evaluator(*eyes).on_task("textvqa", str(path))
    assert (found.questions, dict(found.bad)) == (0, {"wrong-type": 1})
    assert "The row has no field 'answers'" in found.named[0]


def test_all_have_a_place_on_the_hub():
    tested = {*CASES, "gqa", "mvbench"}
    assert tested == set(STANDARD)
    for task in STANDARD.values():
        sources = task.sources(None, {"root": "films"})
        assert {source.path for source in sources} == {f"hub:{task.hub}"}
        assert [source.subset for source in sources] == [*task.subsets] or not task.subsets
        assert {(source.split, source.root, source.max_frames) for source in sources} == {(task.split, "films", 64)}
    with pytest.raises(UserError, match="no task 'chart'; did you mean 'chartqa'"):
        check_standard("chart")


def test_settings_go_before_those_of_the_benchmark(tmp_path, eyes, said, monkeypatch):
    features, rows, answers, _, _ = CASES["chartqa"]
    prompts = said(answers)
    heard = []
    told = evaluator.Answerer.__init__
    monkeypatch.setattr(
        evaluator.Answerer, "__init__", lambda self, *given: heard.append(given[2]) or told(self, *given)
    )
    path = str(saved(tmp_path / "set", features, rows))
    Evaluator(*eyes).on_task("chartqa", path)
    Evaluator(*eyes, suffix="In short.", max_new_tokens=3, limit=1).on_task("chartqa", path)
    assert [one.max_new_tokens for one in heard] == [16, 3]
    assert prompts[0][0] == "How many?\nIn short."


def test_the_hub_itself_is_streamed(tmp_path, eyes, said, monkeypatch):
    """A folder laid out as the hub's repository, its card with it, in the place of the hub's name."""
    features, rows, answers, _, scores = CASES["docvqa"]
    said(answers)
    whole = datasets.load_from_disk(saved(tmp_path / "saved", features, rows))
    for subset in ("DocVQA", "InfographicVQA"):
        (tmp_path / "hub" / subset).mkdir(parents=True)
        whole.to_parquet(tmp_path / "hub" / subset / "validation-00000-of-00001.parquet")
    configs = "".join(
        f"- config_name: {subset}\n  data_files:\n  - split: validation\n    path: {subset}/validation-*\n"
        for subset in ("DocVQA", "InfographicVQA")
    )
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = Evaluator(*eyes).on_task("docvqa", f"hub:{tmp_path / 'hub'}")
    assert scores_of(found) == pytest.approx({**scores, "n": 2, "bad": 0})
    assert found.lines[0]["record"].startswith("hub:")
