"""Reading off a page's cells: what is seen perfectly is read exactly, and neighbours mend what is not."""

import numpy as np
import pytest
import torch

from casa.testing import tiny_tokenizer
from casa.vision.page_encoder import CODE_STEP, PageEncoder, PageEncoderConfig
from casa.vision.page_reading import FOLLOWING, TextRun, read_runs
from casa.vision.page_words import BEFORE, BEGUN, IDS, NOTHING, TAG_IDS, TAGS

LETTERS = " .0123456789:abcdefghijklmnopqrstuvwxyzABCT"


class Page:
    """A page of cells that says what it is told: texts, each with the row and column of its first character."""

    def __init__(self, *texts, step=3, rows=12, columns=80):
        self.middles = torch.zeros(rows, columns)
        self.classes = torch.zeros(1 + len(LETTERS), rows, columns)
        self.classes[0] = 1.0
        self.around = {}
        for text, row, column in texts:
            names = [1 + LETTERS.index(letter) for letter in text]
            padded = [0, *names, *[0] * (FOLLOWING + 1)]
            for number, name in enumerate(names):
                spot = (row, column + step * number)
                self.middles[spot] = 0.9
                self.put(spot, name)
                self.around[spot] = [padded[number], *padded[number + 2 : number + 2 + FOLLOWING]]

    def put(self, spot, name):
        self.classes[:, spot[0], spot[1]] = 0
        self.classes[name, spot[0], spot[1]] = 1.0

    def read(self):
        def around(spots):
            told = torch.zeros(len(spots), 1 + FOLLOWING, 1 + len(LETTERS))
            for number, spot in enumerate(map(tuple, spots.tolist())):
                for place, name in enumerate(self.around[spot]):
                    told[number, place, name] = 1.0
            return told

        return read_runs(self.middles, self.classes, around, LETTERS)


def test_what_is_seen_is_read():
    page = Page(("Tea and buns", 2, 4), ("2.50", 2, 50), ("Total: 4.00", 6, 1))
    found = page.read()
    assert [run.text for run in found] == ["Tea and buns", "2.50", "Total: 4.00"]
    assert found[0].columns.tolist() == [4.0 + 3 * n for n in range(12)]
    assert set(found[2].rows) == {6.0}


def test_an_empty_page_says_nothing():
    assert Page().read() == []


def test_texts_side_by_side_are_told_apart_by_what_they_say_of_themselves():
    # as near as the letters of a word
    page = Page(("tea", 2, 4), ("42", 2, 13))
    assert [run.text for run in page.read()] == ["tea", "42"]


@pytest.mark.parametrize("missing", [[1], [4], [3, 4], [5], [2, 6]])
def test_a_missed_character_is_put_back(missing):
    page = Page(("tilling it", 2, 4))
    for number in missing:
        page.middles[2, 4 + 3 * number] = 0.0
    (run,) = page.read()
    assert run.text == "tilling it"
    assert np.abs(run.columns - (4 + 3 * np.arange(10))).max() < 1.6


def test_a_missed_end_is_put_back_where_the_text_is_known_to_end():
    page = Page(("drier", 2, 4))
    page.middles[2, 16] = 0.0
    assert page.read()[0].text == "drier"
    assert page.around[2, 13] == [1 + LETTERS.index("i"), 1 + LETTERS.index("r"), 0, 0, 0, 0, 0]


def test_a_character_seen_twice_is_read_once_and_a_double_twice():
    page = Page(("spell", 2, 4))
    # the e has another peak beside it, which says of its neighbours what the first says
    page.middles[2, 11] = 0.8
    page.put((2, 11), 1 + LETTERS.index("e"))
    page.around[2, 11] = page.around[2, 10]
    assert page.read()[0].text == "spell"


@pytest.mark.parametrize("text", ["lone", "spell"])
@pytest.mark.parametrize("side", ["first", "second"])
def test_a_character_that_takes_its_twin_for_a_neighbour_is_not_believed(text, side):
    page, number = Page((text, 2, 4)), text.index("e" if text == "spell" else "n")
    name = 1 + LETTERS.index(text[number])
    one, two = (2, 4 + 3 * number), (2, 5 + 3 * number)
    page.middles[two] = 0.9
    page.put(two, name)
    told = page.around[one]
    # of the two, one says of its neighbours what is so
    page.around[two] = told if side == "first" else [name, *told[1:]]
    if side == "first":
        page.around[one] = [told[0], name, *told[1:-1]]
    assert [run.text for run in page.read()] == [text]


def test_grains_of_the_paper_are_no_text():
    page = Page(("tea", 2, 4), ("iu", 6, 4), ("u", 6, 40), ("1", 10, 4), ("i", 10, 40))
    assert [run.text for run in page.read()] == ["tea", "iu", "u", "1", "i"]
    for spot, chance in (((6, 4), 0.5), ((6, 7), 0.2), ((6, 40), 0.6), ((10, 4), 0.6), ((10, 40), 0.8)):
        page.classes[:, *spot] *= chance
    # a letter alone is less likely a text than a digit alone
    assert [run.text for run in page.read()] == ["tea", "1", "i"]


def test_slanting_lines_hold_together():
    page = Page(("ab", 3, 4), ("cd", 4, 10))
    page.around[3, 7] = [1 + LETTERS.index("a"), *(1 + LETTERS.index(letter) for letter in "cd"), 0, 0, 0, 0]
    page.around[4, 10][0] = 1 + LETTERS.index("b")
    assert [run.text for run in page.read()] == ["abcd"]


def run_of(text, row=3, first=1, step=2):
    return TextRun(text, np.full(len(text), float(row)), first + step * np.arange(len(text), dtype=float))


SMALL: dict = {"characters": LETTERS, "stem_sizes": (4, 4), "hidden_size": 8, "dilations": (1,)}


@pytest.fixture
def reader(monkeypatch):
    """An encoder that reads what it is told, with the words of a text model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = PageEncoder(PageEncoderConfig(**SMALL, token_size=(16, 16), reads=True, batch_norm=True)).eval()
        tokenizer = tiny_tokenizer("gpt2")
        codes = torch.nn.functional.normalize(torch.randn(len(tokenizer), 128), dim=-1)
    encoder.learn_words(codes, tokenizer.backend_tokenizer.to_str())
    encoder.config.token_parts = ("words", "places")
    monkeypatch.setattr(PageEncoder, "runs", lambda self, cells: [[run_of("Read line 2")] for _ in cells])
    return encoder, tokenizer, codes


def test_a_token_holds_codes_of_the_words_that_begin_in_it(reader):
    encoder, tokenizer, codes = reader
    sizes = encoder.config.word_sizes
    starts = np.cumsum((0, *sizes)).tolist()
    found = encoder.tokens(torch.zeros(2, 3, 32, 96))
    assert found.shape == (2, 12, sum(sizes) + 28)
    assert torch.equal(found[0], found[1])
    first = tokenizer("Read line 2", add_special_tokens=False)["input_ids"][0]
    own = len(TAGS) + BEFORE
    torch.testing.assert_close(found[0, 6, starts[own] : starts[own + 1]], codes[first], atol=CODE_STEP, rtol=0)
    # the line break stands before it, and nothing before that; the row above is empty, and a text alone has no tags
    assert found[0, 6, starts[own - 1] : starts[own]].any()
    assert not found[0, 6, : starts[own - 1]].any()
    assert not found[0, :6, : starts[-1]].any()


def test_a_shorter_code_is_the_beginning_of_a_longer_and_codes_of_a_slot_go_together(reader):
    encoder, _, _ = reader
    sizes = encoder.config.word_sizes
    starts = np.cumsum((0, *sizes)).tolist()
    whole = encoder.word_codes[7].float() * CODE_STEP
    ids = torch.full((IDS,), NOTHING)
    ids[TAG_IDS:] = 7
    code = encoder.codes_of(ids, torch.float32)
    for slot in range(len(TAGS), len(TAGS) + BEFORE + BEGUN):
        size = sizes[slot]
        torch.testing.assert_close(code[starts[slot] : starts[slot + 1]], whole[:size] * (max(sizes) / size) ** 0.5)
    assert not code[: starts[len(TAGS)]].any()
    ids[1:4] = 7  # three of one group, and one of the next one
    ids[8] = 7
    tags = encoder.codes_of(ids, torch.float32)[: starts[1]]
    torch.testing.assert_close(tags, (3**0.5 + 1) * whole[: sizes[0]] * (max(sizes) / sizes[0]) ** 0.5)


def test_words_are_saved_and_folded_with_the_encoder(reader, tmp_path):
    encoder, _, _ = reader
    pixels = torch.randn(1, 3, 32, 96, generator=torch.Generator().manual_seed(1))
    found = encoder.tokens(pixels)
    folded = encoder.folded()
    assert torch.equal(folded.tokens(pixels), found)
    folded.save_pretrained(tmp_path)
    again = PageEncoder.from_pretrained(tmp_path).eval()
    assert again.config.vocabulary[0] == len(encoder.word_codes)
    assert torch.equal(again.tokens(pixels), found)
    half = PageEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.word_codes.dtype == torch.int8
    assert half.tokens(pixels.bfloat16()).dtype == torch.bfloat16


def test_words_that_were_not_learned_are_refused():
    with pytest.raises(ValueError, match="learn_words"):
        PageEncoderConfig(token_parts=("words",), reads=True)
    with pytest.raises(ValueError, match="learn_words"):
        PageEncoderConfig(token_parts=("words",), vocabulary=(9, 9))


def test_an_untrained_encoder_reads_without_harm(monkeypatch):
    for name in ("SURE_TEXT", "SURE_LETTER"):  # it is never sure
        monkeypatch.setattr(f"casa.vision.page_reading.{name}", 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = PageEncoder(PageEncoderConfig(**SMALL, reads=True)).eval()
        with torch.no_grad():
            encoder.middles.bias.fill_(3.0)
            runs = encoder.runs(encoder(torch.randn(2, 3, 64, 96)))
    assert len(runs) == 2
    assert all(runs)
    assert all(len(run.text) == len(run.rows) == len(run.columns) > 0 for page in runs for run in page)
