"""What a page says, read off its cells: characters in lines.

A character is where the map of middles has a peak. Every character also tells which one stands before it and which ones
follow: so one that was missed is put back, one that was seen twice is dropped, and a text ends where it says so.

Shapes: R x C cells of a page, K classes (0: no character), F characters that follow, M peaks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FOLLOWING = 6
"""F: how many characters behind it a cell tells."""

LEAST_MIDDLE = 0.4  # of the probability that a character has its middle in a cell
MOST_EMPTY = 0.6  # of the probability that a cell has no character
FARTHEST = 24  # cells from a character to the next of its line
TWICE = 3  # cells between peaks of a character that is seen twice, at most
MISSED = 3  # characters put back between two, at most
MISSING = 1.5  # nats that one of these costs
SURE = 0.6  # of a character put back at the end of a text
SURE_TEXT, SURE_LETTER = 0.37, 0.7  # of a text's middling character, and of a letter alone


@dataclass(frozen=True)
class TextRun:
    """A piece of writing in one line. rows, columns: float (n,), middles of its characters in cells."""

    text: str
    rows: np.ndarray
    columns: np.ndarray


def read_runs(middles: Tensor, classes: Tensor, around: Callable[[Tensor], Tensor], characters: str) -> list[TextRun]:
    """The texts of a page, from above, those of a line from the left.

    Args:
        middles: (R, C), probability that a character has its middle in a cell.
        classes: (K, R, C), probabilities.
        around: Cells (M, 2), row and column, to probabilities (M, 1 + F, K) of the character before and those behind.
        characters: What the classes from 1 stand for.
    """
    above = torch.nn.functional.pad(middles, (0, 0, 1, 0))[:-1]
    below = torch.nn.functional.pad(middles, (0, 0, 0, 1))[1:]
    peaks = (middles >= LEAST_MIDDLE) & (middles >= above) & (middles > below) & (classes[0] < MOST_EMPTY)
    spots = torch.nonzero(peaks)
    if not len(spots):
        return []
    best = 1 + classes[1:, spots[:, 0], spots[:, 1]].argmax(0)
    page = _Peaks(
        spots.cpu().numpy(),
        best.cpu().numpy(),
        middles[spots[:, 0], spots[:, 1]].float().cpu().numpy(),
        around(spots).float().cpu().numpy(),
    )
    runs = [_text(run, characters) for line in page.lines() for run in page.runs(line)]
    likely = classes[1:].amax(0).float().cpu().numpy()
    sure = (run for run in runs if run.text and _is_sure(run, likely))
    return sorted(sure, key=lambda run: (run.rows.mean(), run.columns[0]))


Placed = tuple[int, float, float]  # class, row, column


@dataclass(frozen=True)
class _Peaks:
    """spots: int (M, 2). best: (M,) classes. sure: (M,), of the middle. around: (M, 1 + F, K), probabilities."""

    spots: np.ndarray
    best: np.ndarray
    sure: np.ndarray
    around: np.ndarray

    def lines(self) -> list[list[int]]:
        """Peaks from the left: each joins the line whose last one is near."""
        lines: list[list[int]] = []
        for peak in np.argsort(self.spots[:, 1], kind="stable").tolist():
            row, column = self.spots[peak]
            near = [
                (abs(self.spots[line[-1]][0] - row), column - self.spots[line[-1]][1], number)
                for number, line in enumerate(lines)
                if abs(self.spots[line[-1]][0] - row) <= 1 and column - self.spots[line[-1]][1] <= FARTHEST
            ]
            if near:
                lines[min(near)[2]].append(peak)
            else:
                lines.append([peak])
        return lines

    def runs(self, line: list[int]) -> list[list[Placed]]:
        """A line's texts, each character with its place."""
        found: list[list[Placed]] = [[self._placed(line[0])]]
        last = line[0]
        for peak in line[1:]:
            if (kept := self._same(last, peak)) is not None:
                if kept == peak:
                    found[-1][-1] = self._placed(peak)
                last = kept
                continue
            missed = self._missed(last, peak)
            if missed is None:
                found[-1] += self._end(last)
                found.append([])
            else:
                (row, column), (to_row, to_column) = self.spots[last], self.spots[peak]
                between = np.linspace(0, 1, len(missed) + 2)[1:-1].tolist()
                found[-1] += [
                    (name, row + share * (to_row - row), column + share * (to_column - column))
                    for name, share in zip(missed, between, strict=True)
                ]
            found[-1].append(self._placed(peak))
            last = peak
        found[-1] += self._end(last)
        return found

    def _placed(self, peak: int) -> Placed:
        return int(self.best[peak]), float(self.spots[peak][0]), float(self.spots[peak][1])

    def _same(self, last: int, peak: int) -> int | None:
        """Of two peaks of one character, the one that stays; None if they are two characters."""
        gap = self.spots[peak][1] - self.spots[last][1]
        follows = self.around[last, 1, self.best[peak]]
        precedes = self.around[peak, 0, self.best[last]]
        if self.best[last] == self.best[peak]:
            if gap > TWICE or min(follows, precedes) >= 0.5:
                return None
            # the one that takes the other for its neighbour does not know its own
            return peak if follows > precedes else last
        if gap <= 1 and follows + precedes < 0.3:
            return peak if self.sure[peak] > self.sure[last] else last
        return None

    def _missed(self, last: int, peak: int) -> list[int] | None:
        """Classes of the characters between two, mostly none; None where one text ends and another begins."""
        names = self.around[last, 1:].argmax(-1).tolist()
        ends = float(np.log(self.around[last, 1, 0] + 1e-4) + np.log(self.around[peak, 0, 0] + 1e-4))
        best, found = ends, None
        most = MISSED if self.spots[peak][1] - self.spots[last][1] > 1 else 0
        for count in range(most + 1):
            before = self.best[last] if count == 0 else names[count - 1]
            score = np.log(self.around[last, 1 + count, self.best[peak]] + 1e-4)
            score += np.log(self.around[peak, 0, before] + 1e-4) - MISSING * count
            if score > best and 0 not in names[:count]:
                best, found = float(score), names[:count]
        return found

    def _end(self, last: int) -> list[Placed]:
        """Characters behind a text's last peak that it is sure of."""
        _, row, column = self._placed(last)
        found: list[Placed] = []
        for chances in self.around[last, 1 : 1 + MISSED]:
            name = int(chances.argmax())
            if name == 0 or chances[name] < SURE:
                break
            found.append((name, row, column + 1 + len(found)))
        # without an end in sight it may go on beyond the page
        return found if self.around[last, 1 + len(found)].argmax() == 0 else []


def _is_sure(run: TextRun, likely: np.ndarray) -> bool:
    """Whether a text is no grain of the paper. likely: (R, C), probability of a cell's best character."""
    rows = np.minimum(run.rows.round().astype(int), likely.shape[0] - 1)
    columns = np.minimum(run.columns.round().astype(int), likely.shape[1] - 1)
    is_letter = len(run.text) == 1 and run.text.isalpha()
    return bool(np.median(likely[rows, columns]) >= (SURE_LETTER if is_letter else SURE_TEXT))


def _text(run: list[Placed], characters: str) -> TextRun:
    """Without blanks at the ends."""
    text = "".join(characters[name - 1] for name, _, _ in run)
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    places = np.array([place for _, *place in run[first:last]], dtype=float).reshape(-1, 2)
    return TextRun(text[first:last], places[:, 0], places[:, 1])
