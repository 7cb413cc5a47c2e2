"""What is asked of pictures: drawn by seed, answered by what the picture shows, held out where it says so."""

import base64
import json
import re
from html import unescape

import numpy as np
import pytest

from projects.casa_smol.fetch import folder_of
from projects.casa_smol.sheet import sheet
from projects.casa_smol.tasks import BROWSED, PAINTED, Browser, asked, drawings
from projects.casa_smol.tasks.asked import ordinal, some, turn
from projects.casa_smol.tasks.documents import DOCUMENTS
from projects.casa_smol.tasks.films import KINDS, film
from projects.casa_smol.tasks.html import CHROMIUM, Html, faces_for
from projects.casa_smol.tasks.screens import SCREENS
from projects.casa_smol.tasks.things import Money, Things

WRITTEN = DOCUMENTS | SCREENS
# answers that are counted, compared or seen, not read
TOLD = re.compile(r"\d+|Yes|No|[a-z]+|(at the )?(top|bottom)? ?(left|right|middle)?")


def text_of(html):
    """What a document says, as a person reads it."""
    body = re.sub(r'<input value="([^"]*)">', r" \1 ", html.body)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


@pytest.mark.parametrize("task", PAINTED)
def test_painted_tasks_are_their_seeds(task):
    one, two = (list(asked(task, "train", 3, 2, start=start)) for start in (0, 1))
    assert np.array_equal(one[1].picture, two[0].picture)
    assert one[1].turns == two[0].turns
    assert one[0].turns != one[1].turns
    assert one[0].picture.mode == "RGB"
    held_out = next(asked(task, "held_out", 3, 1))
    assert held_out.turns != one[0].turns
    assert all(turn.question and turn.answers and all(turn.answers) for turn in (*held_out.turns, *one[0].turns))


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_read_off_documents_stands_in_them(name):
    read = 0
    for number in range(12):
        html, turns = WRITTEN[name](np.random.default_rng(number), ("train", "held_out")[number % 2])
        again, same = WRITTEN[name](np.random.default_rng(number), ("train", "held_out")[number % 2])
        assert (html, turns) == (again, same)
        assert len({one.question for one in turns}) == len(turns) > 2
        said = text_of(html)
        for one in turns:
            if not TOLD.fullmatch(one.answers[0]) and ", " not in one.answers[0]:
                read += 1
                assert any(answer in said for answer in one.answers), (one, said)
    assert read > 6


def test_layouts_held_out_are_not_trained_on():
    orders = {}
    for split in ("train", "held_out"):
        drawn = [DOCUMENTS["table"](np.random.default_rng(seed), split)[0].body for seed in range(40)]
        orders[split] = {("h4" in body) for body in drawn if "<h3" in body or "<h4" in body}
    assert orders == {"train": {False}, "held_out": {True}}


def test_a_total_is_its_items_and_the_tax():
    for seed in range(20):
        html, turns = DOCUMENTS["receipt"](np.random.default_rng(seed), "train")
        asked_for = {one.question.lower().rstrip("?"): one.answers for one in turns}
        change = [answers for question, answers in asked_for.items() if "change" in question]
        if change:
            rows = re.findall(
                r"<td>(Cash|Change|Total[^<]*|TOTAL|Amount|Grand total|To pay)</td><td class=n>([^<]+)", html.body
            )
            amounts = {name: float(re.sub(r"[^\d]", "", value)) for name, value in rows}
            total = next(value for name, value in amounts.items() if name not in ("Cash", "Change"))
            assert amounts["Cash"] - total == amounts["Change"]
            return
    pytest.fail("no receipt paid in cash")


def test_money_is_written_in_one_way_a_document_and_read_in_all():
    for seed in range(30):
        money = Money(np.random.default_rng(seed))
        shown = money.full(123456)
        assert re.sub(r"\D", "", shown) == "123456"
        assert "1234.56" in money.ways(123456, shown)
        assert money.ways(123456, shown)[0] == shown


def test_names_held_out_are_drawn_in_evaluation_alone():
    train, held_out = (Things(np.random.default_rng(1), split) for split in ("train", "held_out"))
    seen = {train.pick("cities") for _ in range(400)}
    assert {held_out.pick("cities") for _ in range(400)} - seen
    assert len(train.distinct(500, lambda: train.pick("jobs"))) < 500


def test_questions_vary_and_none_is_asked_twice():
    rng = np.random.default_rng(1)
    turns = [turn(rng, ("What is {a}?", "Which is {a}?"), 5, "five", 5, a="it") for _ in range(200)]
    assert {one.answers for one in turns} == {("5", "five")}
    assert {"What is it?", "Which is it?", "what is it?", "What is it"} <= {one.question for one in turns}
    assert len(some(rng, turns, 3)) == 3
    assert [ordinal(n) for n in (1, 3, 20)] == ["first", "third", "twentieth"]


@pytest.mark.parametrize("kind", KINDS)
def test_films_say_what_is_new_where_it_appears(kind):
    one = film((1, 2), "train", seconds=8, kind=kind)
    assert len(one.frames) == len(one.said) == 16
    assert {frame.size for frame in one.frames} == {one.frames[0].size}
    assert film((1, 2), "train", seconds=8, kind=kind).said == one.said
    spoken = [place for place, text in enumerate(one.said) if text and place]
    assert spoken
    for place in spoken:
        before, after = (np.asarray(one.frames[n], dtype=float) for n in (place - 1, place))
        assert np.abs(before - after).max() > 40
    silent = [place for place, text in enumerate(one.said) if not text and place and one.said[place - 1]]
    assert all(np.array_equal(one.frames[place], one.frames[place - 1]) for place in silent[:1] if kind != "signs")


EMOJI = ("hot-dog", "red-apple", "sailboat", "flag-peru", "teapot", "rice-ball", "tiger-face", "coconut")


@pytest.fixture
def emoji():
    """Two styles seen and the one never seen, with seven names each."""
    svg = '<path fill="#{0}{0}{0}" d="M0 0h9v9H0z"/>'
    for number, style in enumerate(drawings.STYLES):
        folder = folder_of("npm", f"@iconify-json/{style}")
        folder.mkdir(parents=True, exist_ok=True)
        names = {name: {"body": svg.format(number)} for name in EMOJI}
        (folder / "icons.json").write_text(json.dumps({"width": 9, "height": 9, "icons": names}))
    drawings.styles.cache_clear()
    yield
    drawings.styles.cache_clear()


def test_a_style_is_never_trained_on(emoji, monkeypatch):
    monkeypatch.setattr(drawings, "is_held_out", lambda name: name == "teapot")
    drawn = {
        split: [drawings.drawing(np.random.default_rng(seed), split) for seed in range(30)]
        for split in ("train", "held_out")
    }

    def seen(split):
        bodies = " ".join(html.body for html, _ in drawn[split])
        return {base64.b64decode(data).decode()[-28:-25] for data in re.findall(r"base64,([^\"]+)", bodies)}

    assert len(seen("train")) == 3
    assert len(seen("held_out") - seen("train")) == 1
    answers = {answer for _, turns in drawn["train"] for one in turns for answer in one.answers}
    assert "hot dog" in answers
    assert not answers & {"teapot", "flag peru"}


@pytest.mark.slow
@pytest.mark.skipif(not __import__("pathlib").Path(CHROMIUM).exists(), reason="needs Chromium")
def test_the_browser_draws_many_documents_at_once():
    rng = np.random.default_rng(1)
    faces = faces_for(rng, "train")
    with Browser() as browser:
        small = Html("<p>abc</p>", "background: rgb(10,200,30); font: 20px face(text)", 120, faces)
        wide = Html(
            "<table><tr><td>averyveryverylongword</td></tr></table>",
            "background: #fff; font: 30px face(text)",
            60,
            faces,
        )
        one, two = browser.draw([small, wide])
        assert one.width == 120
        assert one.getpixel((1, one.height - 1)) == (10, 200, 30)
        assert np.asarray(one).min() < 10
        assert two.width > 200  # nothing is cut off
        tasks = [name for name in BROWSED if name != "drawing"]
        drawn = [next(asked(task, "train", 1, 1, browser=browser)) for task in tasks]
        assert all(min(picture.picture.size) > 50 for picture in drawn)
        assert np.array_equal(drawn[0].picture, next(asked(tasks[0], "train", 1, 1, browser=browser)).picture)
    assert sheet(drawn).width == 3 * 420
