"""`casa eval --ablate`: the answers are those of the model without that part, or about other records' pictures."""

import json

import numpy as np
import pytest
from PIL import Image

import casa as package
from casa.analysis import ablated
from casa.data import SourceSettings
from casa.errors import UserError
from casa.evaluation.questions import read_questions, shuffled_pictures

QUESTIONS = [("a", "what?"), ("a", "where is it"), ("b", "who"), ("c", "and this one?"), (None, "no picture")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("qa")
    generator = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(generator.integers(0, 255, (84, 56, 3), dtype=np.uint8)).save(made / f"{name}.png")
    rows = [
        {"question": asked, "answer": "x"} | ({"image": f"{name}.png"} if name else {}) for name, asked in QUESTIONS
    ]
    (made / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def answers(casa, checkpoint, folder, path, *options):
    settings = ("--metric", "exact", "--records", path, "--max-new-tokens", 4)
    result = casa("eval", checkpoint, "--data", folder / "qa.jsonl", *settings, *options)
    assert (result.status, result.err) == (0, "")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["answer"] for line in lines if "answer" in line]


def asked(checkpoint, folder, names, *ablations):
    eyes = package.load(checkpoint)
    with ablated(eyes.model, *ablations):
        return [
            eyes.ask(folder / f"{name}.png" if name else None, question, max_new_tokens=4)
            for name, (_, question) in zip(names, QUESTIONS, strict=True)
        ]


@pytest.mark.parametrize(
    "names", [pytest.param(("no-images",), marks=pytest.mark.slow), ("without-layers=0,2", "no-random-text")], ids=str
)
def test_answers_are_those_of_the_model_without_it(casa, checkpoint, folder, tmp_path, names):
    options = [word for name in names for word in ("--ablate", name)]
    found = answers(casa, checkpoint, folder, tmp_path / "out.jsonl", *options)
    own = [name for name, _ in QUESTIONS]
    assert found == asked(checkpoint, folder, own, *names)
    assert found != asked(checkpoint, folder, own)


def test_shuffled_pictures_are_those_of_the_next_record_that_has_others(casa, checkpoint, folder, tmp_path):
    found = answers(casa, checkpoint, folder, tmp_path / "out.jsonl", "--ablate", "shuffled-images")
    assert found == asked(checkpoint, folder, ["b", "b", "c", "a", None])
    questions = list(read_questions([SourceSettings(str(folder / "qa.jsonl"))]))
    moved = list(shuffled_pictures(iter(questions)))
    assert [[picture.source.stem for picture in one.pictures] for one in moved] == [["b"], ["b"], ["c"], ["a"], []]
    assert [(one.index, one.text, one.references) for one in moved] == [
        (one.index, one.text, one.references) for one in questions
    ]
    with pytest.raises(UserError, match="all are about the same"):
        list(shuffled_pictures(iter(questions[:2])))


def test_answers_of_another_ablation_are_not_gone_on_with(casa, checkpoint, folder, tmp_path):
    path = tmp_path / "out.jsonl"
    answers(casa, checkpoint, folder, path, "--ablate", "no-images")
    options = ("--metric", "exact", "--records", path, "--max-new-tokens", 4, "--resume")
    result = casa("eval", checkpoint, "--data", folder / "qa.jsonl", *options)
    assert result.status == 2


def test_wrong_ablations_are_told_in_a_sentence(casa, checkpoint):
    result = casa("eval", "no-such-model", "--ablate", "no-image")
    assert (result.status, result.err) == (2, "casa: there is no ablation 'no-image'; did you mean 'no-images'?\n")
    result = casa("eval", checkpoint, "--tasks", "pages", "--ablate", "shuffled-images")
    assert result.status == 2
    assert result.err.startswith(
        "casa: shuffled-images takes pictures of other records; leave it out of --ablate, or name --data."
    )
