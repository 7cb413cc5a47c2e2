"""Generated examples as files: what is written is what is read, and the same seed writes the same bytes."""

from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from casa.data import open_records, parse_data_settings
from casa.data.made import write_clips, write_pictures
from casa.data.record import Picture, Text
from casa.errors import UserError


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str


@dataclass(frozen=True)
class Drawn:
    image: Image.Image
    turns: tuple[Turn, ...]


def drawn(rng, size):
    height, width = size or (56, 84)
    pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Drawn(Image.fromarray(pixels), tuple(Turn(f"What is {n}?", str(n)) for n in range(6)))


@dataclass(frozen=True)
class Clip:
    said: tuple[str, ...]
    height: int = 56
    width: int = 84

    def frames(self):
        return (Image.new("RGB", (self.width, self.height), (40 * n, 0, 0)) for n in range(len(self.said)))

    def captions(self):
        return list(self.said)


def records(path):
    return open_records(parse_data_settings({"sources": [{"path": str(path)}], "exhausted": "leave", "shuffle": 0}))


def test_pictures_come_back_with_their_questions(tmp_path):
    write_pictures(tmp_path / "a.tar", drawn, 12, (1, 0), turns=4, sides=(56, 112))
    found = list(records(tmp_path / "a.tar"))
    assert len(found) == 12
    turns, sizes = set(), set()
    for record in found:
        said = record.messages
        assert isinstance(said[0].parts[0], Picture)
        for asked, answer in zip(said[::2], said[1::2], strict=True):
            assert asked.parts[-1].text == f"What is {answer.parts[0].text}?"
        assert sum(isinstance(part, Picture) for message in said for part in message.parts) == 1
        turns.add(len(said) // 2)
        sizes.add(len(said[0].parts[0].source))
    assert turns == {1, 2, 3, 4}
    assert len(sizes) > 6


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_pictures(tmp_path / f"{name}.tar", drawn, 3, (seed, 0))
    one, same, other = ((tmp_path / f"{name}.tar").read_bytes() for name in "abc")
    assert one == same != other


def test_sides_are_whole_cells_within_bounds(tmp_path):
    asked = []

    def noted(rng, size):
        asked.append(size)
        return drawn(rng, (28, 28))

    told = []
    write_pictures(tmp_path / "a.tar", noted, 200, (1, 0), sides=(56, 112), told=told.append)
    assert {side for size in asked for side in size} == {56, 84, 112}
    asked.clear()
    write_pictures(tmp_path / "b.tar", noted, 200, (1, 0), sides=(50, 120))
    assert {side for size in asked for side in size} == {56, 84, 112}
    assert told == list(range(1, 201))


@pytest.mark.slow
@pytest.mark.parametrize("fps", [2.0, 3.0, 30.0])
def test_words_stay_with_their_frames(tmp_path, fps):
    said = ("", "407", "", "", "8", "15")
    silent = iter([("",) * 3, said, said])
    write_clips(tmp_path / "clips.jsonl", lambda rng: Clip(next(silent)), 2, (1, 2), prompt="Say it.", fps=fps)
    settings = {"path": str(tmp_path / "clips.jsonl"), "fps": fps}
    found = list(open_records(parse_data_settings({"sources": [settings], "exhausted": "leave", "shuffle": 0})))
    assert len(found) == 2
    for record in found:
        assert record.messages[0].parts[0].text == "Say it."
        captions = []
        for part in record.messages[1].parts:
            if isinstance(part, Picture):
                captions.append("")
            elif isinstance(part, Text):
                captions[-1] = part.text
        assert tuple(captions) == said


def test_silent_sources_and_folders_in_use_are_refused(tmp_path):
    with pytest.raises(UserError, match="silent"):
        write_clips(tmp_path / "a.jsonl", lambda rng: Clip(("",) * 2), 1, (1,), prompt="Say it.", fps=2)
    assert not (tmp_path / "a.jsonl").exists()
    with pytest.raises(UserError, match="exists already"):
        write_clips(tmp_path / "a.jsonl", lambda rng: Clip(("1",)), 1, (1,), prompt="Say it.", fps=2)
