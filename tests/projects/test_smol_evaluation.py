"""Answers judged, and a model asked about held-out pictures with and without them."""

import json

import pytest

from casa import FusionConfig, adapt
from casa.models.auto import processor_for
from casa.testing import tiny_processor, tiny_text_model
from casa.vision.page_encoder import PageEncoder, PageEncoderConfig
from projects.casa_smol.evaluation import Answering, evaluate, main
from projects.casa_smol.metrics import anls, characters, distance, exact, relaxed, verbatim


def test_distance_counts_characters():
    pairs = (("", "abc"), ("abc", "abc"), ("abd", "abc"), ("kitten", "sitting"))
    assert [distance(*pair) for pair in pairs] == [3, 0, 1, 3]


@pytest.mark.parametrize(
    ("judge", "said", "answers", "score"),
    [
        (verbatim, " Total:  4 ", ["Total: 4"], 1.0),
        (verbatim, "total: 4", ["Total: 4"], 0.0),
        (exact, "berlin.", ["Paris", "Berlin"], 1.0),
        (exact, "Berlin, Germany", ["Berlin"], 0.0),
        (anls, "Berlim", ["Berlin"], 1 - 1 / 6),
        (anls, "Rome", ["Berlin"], 0.0),
        (relaxed, "104", ["100"], 1.0),
        (relaxed, "$1,049.0", ["1000"], 1.0),
        (relaxed, "106", ["100"], 0.0),
        (relaxed, "12%", ["12.1"], 1.0),
        (relaxed, "yes", ["Yes"], 1.0),
        (relaxed, "0", ["0"], 1.0),
    ],
)
def test_answers_are_judged(judge, said, answers, score):
    assert judge(said, answers) == pytest.approx(score)


def test_characters_are_those_of_the_nearest_answer():
    assert characters("4.20", ["$4.20", "4.20 $", "4.2"]) == (1, 5)


def test_each_way_is_scored_by_the_tasks_own_measure():
    def knows(picture, turn, way):
        return turn.answer if way == "seen" else "nothing"

    found = evaluate(knows, ["line", "chart"], 4, 1, ("seen", "blind"))
    assert found["line"]["seen"] == {"verbatim": 1.0, "anls": 1.0, "character_error_rate": 0.0, "questions": 4}
    assert found["line"]["blind"]["verbatim"] == 0.0
    assert found["chart"]["seen"]["relaxed"] == 1.0
    assert found["chart"]["seen"]["questions"] == 4


@pytest.mark.slow
def test_a_model_is_asked(tmp_path, capsys):
    small = {"stem_sizes": (4, 4), "hidden_size": 8, "dilations": (1,)}
    encoder = PageEncoder(PageEncoderConfig(**small))
    adapt(tiny_text_model(), FusionConfig(), vision=encoder.double()).save_pretrained(tmp_path / "m")
    processor_for(tiny_processor().tokenizer, encoder.config).save_pretrained(tmp_path / "m")
    assert main([str(tmp_path / "m"), "--tasks", "line", "--count", "2", "--out", str(tmp_path / "a.json")]) == 0
    scores = json.loads((tmp_path / "a.json").read_text())["scores"]["line"]
    assert set(scores) == {"seen", "blind", "told"}
    assert "line" in capsys.readouterr().out
    assert Answering(str(tmp_path / "m")).model.training is False
