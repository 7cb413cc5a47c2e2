"""Films in which text appears, told frame by frame: the word error rate, and silence where nothing is new."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from casa.evaluation.metrics import Score, edit_distance, words
from casa.evaluation.scoring import interval
from projects.casa_smol.metrics import distance, wilson
from projects.casa_smol.peers import Reader
from projects.casa_smol.tasks.films import Film, film

Watch = Callable[[Sequence[Image.Image]], list[str]]
"""From a film's frames to what is said of each, "" for nothing."""

MOST_ALIKE = 0.4  # of two lines' letters differ at most, if they are one line read twice


def films(seed: int, count: int) -> Iterator[Film]:
    """Films that nothing was trained on."""
    for number in range(count):
        yield film((seed, number), "held_out")


def watching(eyes: Any) -> Watch:
    """A model that watches live, one session for each film. eyes: what `casa.load` gives."""

    def watch(frames: Sequence[Image.Image]) -> list[str]:
        session = eyes.stream(max_new_tokens=64)
        return [session.step(frame) for frame in frames]

    return watch


def reading_anew(read: Reader) -> Watch:
    """A reader that says the lines that it did not read in the frame before."""

    def watch(frames: Sequence[Image.Image]) -> list[str]:
        said, before, last = list[str](), list[str](), None
        for frame in frames:
            seen = frame.tobytes()
            if seen == last:
                said.append("")
                continue
            lines, last = read(frame, "film"), seen
            said.append(" ".join(line for line in lines if not any(_is_same(line, old) for old in before)))
            before = lines
        return said

    return watch


def _is_same(one: str, two: str) -> bool:
    longest = max(len(one), len(two))
    return abs(len(one) - len(two)) <= MOST_ALIKE * longest and distance(one, two) <= MOST_ALIKE * longest


def scores(watched: Sequence[Film], watch: Watch) -> dict[str, Any]:
    """Word error rate over all films, and of how many frames with nothing new nothing was said."""
    edits, silent, quiet = [], 0, 0
    for one in watched:
        said = watch(one.frames)
        truth = words(one.said)
        edits.append(Score(edit_distance(truth, words(said)), len(truth)))
        nothing = [text for text, new in zip(said, one.said, strict=True) if not new]
        quiet += len(nothing)
        silent += nothing.count("")
    found = interval(edits)
    return {
        "word_error_rate": round(found.score, 4),
        "word_error_rate_interval": [round(found.low, 4), round(found.high, 4)],
        "words": int(sum(one.of for one in edits)),
        "films": len(edits),
        "silent": round(silent / max(1, quiet), 4),
        "silent_interval": [round(end, 4) for end in wilson(silent / max(1, quiet), quiet)],
        "frames_with_nothing_new": quiet,
    }
