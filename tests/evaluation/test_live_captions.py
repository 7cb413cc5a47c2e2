"""Live captions: scores worked out by hand, a session that watches the frames of a record, and a judge behind HTTP."""

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from casa.data import SourceSettings
from casa.errors import UserError
from casa.evaluation.evaluator import Evaluator
from casa.evaluation.judge import Judge
from casa.evaluation.live_captions import LIVE_SCORERS, live_lag, matches, true_captions
from casa.evaluation.metrics import edit_distance
from casa.evaluation.questions import read_questions
from casa.media import VideoWriter
from casa.testing import tiny_casa, tiny_processor

WORDS = st.lists(st.sampled_from("abc"), max_size=7)


def line(truth, captions):
    return {"truth": truth, "captions": [[*entry, 0.1] for entry in captions]}


@pytest.mark.parametrize(
    ("truth", "captions", "wanted"),
    [
        # two of four words are right: one on time, one a second late
        ([[0.0, "And she"], [1.0, "scores again"]], [[0.0, "And he"], [2.0, "scores"]], [(2, 4), (1.0, 2), (0, 0)]),
        # said before it is due
        ([[2.0, "Goal!"]], [[1.5, "goal"]], [(0, 1), (-0.5, 1), (0, 0)]),
        # silence
        ([[0.0, "And she"]], [], [(2, 2), (0, 0), (0, 0)]),
        # of three runs of four words, the last was there before
        ([[0.0, "a b c d a b c d"]], [[0.0, "a b c d"], [1.0, "a b c d"]], [(0, 8), (4.0, 8), (1, 5)]),
    ],
)
def test_scores_by_hand(truth, captions, wanted):
    assert [score(line(truth, captions)) for score in LIVE_SCORERS.values()] == wanted
    assert [score({"answer": "x"}) for score in LIVE_SCORERS.values()] == [None] * 3, "no stream"


@given(WORDS, WORDS)
def test_words_are_aligned_with_the_fewest_edits(reference, hypothesis):
    found = matches(reference, hypothesis)
    assert found == sorted(found)
    assert all(reference[i] == hypothesis[j] for i, j in found)
    assert len(set(found)) == len({i for i, _ in found}) == len({j for _, j in found})
    # between two pairs, the longer gap is how many edits there are
    ends = [(-1, -1), *found, (len(reference), len(hypothesis))]
    gaps = [max(b[0] - a[0], b[1] - a[1]) - 1 for a, b in itertools.pairwise(ends)]
    assert sum(gaps) == edit_distance(reference, hypothesis)
    if reference:
        told = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
        assert sum(gaps) == told.substitutions + told.insertions + told.deletions


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    with VideoWriter(folder / "clip.mp4", (56, 56), fps=4) as writer:
        for level in range(8):
            writer.write(np.full((56, 56, 3), 30 * level, dtype=np.uint8))
    row = {"video": "clip.mp4", "title": "Look.", "words": [[0.1, 0.2, "Light"], [1.2, 1.4, "comes."]]}
    (folder / "live.jsonl").write_text(json.dumps(row) + "\n")
    return folder


class Repeats:
    """Says what it is told, frame by frame."""

    def __init__(self, prompt):
        self.prompt, self.left = prompt, ["Light", "", "comes on"]

    def step(self, frame):
        assert frame.size == (56, 56)
        return self.left.pop(0)


def evaluator(tmp_path=None, judge=None, **settings):
    opened = []

    def make_session(prompt):
        opened.append(Repeats(prompt))
        return opened[-1]

    return Evaluator(tiny_casa(), tiny_processor(), make_session=make_session, judge=judge, **settings), opened


def test_a_live_record_is_watched(film, tmp_path):
    (asked,) = read_questions([SourceSettings(str(film / "live.jsonl"))])
    assert true_captions(asked) == [(0.0, "Light"), (1.0, "comes.")]
    evaluate, opened = evaluator(records=tmp_path / "out.jsonl")
    found = evaluate.on_data(str(film / "live.jsonl"), ["live", "wer"])
    assert [session.prompt for session in opened] == ["Look."]
    (written,) = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written["answer"] == "Light comes on"
    assert [entry[:2] for entry in written["captions"]] == [[0.0, "Light"], [1.0, "comes on"]]
    # one word too many of two, both on time
    assert {name: one.score for name, one in found.metrics.items() if one.n and one.score == one.score} == {
        "wer": 1.0, "live_wer": 0.5, "live_lag": 0.0,
    }  # fmt: skip
    assert live_lag(written) == (0.0, 2)


class Answers(BaseHTTPRequestHandler):
    """A judge that says what it is told, and keeps what it was asked."""

    replies: ClassVar[list] = []
    asked: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers.get("Authorization"), body))
        status, text = self.replies.pop(0)
        reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Answers.replies, Answers.asked = [], []
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/"
        server.shutdown()
        thread.join()


def test_a_judge_gives_each_answer_a_number(film, server, tmp_path):
    Answers.replies = [(503, "busy"), (200, "7")]
    judge = Judge(server, "wise", key="secret", wait=0)
    evaluate, _ = evaluator(records=tmp_path / "out.jsonl", judge=judge)
    found = evaluate.on_data(str(film / "live.jsonl"), ["live"])
    assert found.metrics["judge"].score == 0.7
    path, key, body = Answers.asked[-1]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer secret", "wise", 0)
    (message,) = body["messages"]
    for words in ("Question: Look.", "Reference: Light comes.", "Given: Light comes on"):
        assert words in message["content"]
    # what was judged is not judged again
    evaluate, _ = evaluator(records=tmp_path / "out.jsonl", judge=judge, resume=True)
    assert evaluate.on_data(str(film / "live.jsonl"), ["live"]).metrics["judge"].score == 0.7
    assert len(Answers.asked) == 2


@pytest.mark.parametrize(
    ("replies", "words"),
    [
        ([(200, "very good")], "replied 'very good', no number from 0 to 10"),
        ([(200, "12")], "no number from 0 to 10"),
        ([(401, "no")], "does not answer .status 401"),
        ([(500, "no")] * 4, "go on with resume=True"),
    ],
)
def test_a_judge_that_does_not_judge_is_told(server, replies, words):
    Answers.replies = replies
    with pytest.raises(UserError, match=words):
        Judge(server, "wise", wait=0)({"question": "What?", "references": ["x"], "answer": ""})
    assert not Answers.replies


def test_a_judge_that_is_not_there():
    with pytest.raises(UserError, match="does not answer"):
        Judge("http://127.0.0.1:9/v1", "wise", wait=0)({"question": "What?", "references": ["x"], "answer": "x"})
