"""What pages say, by seed: words, sentences, numbers, prices, dates, codes, names.

Words are split by a hash into those of training and those held out; held-out words are drawn in evaluation alone.
The list is Debian's small American English where it is fetched, else the few common words below.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from numpy.random import Generator

from projects.casa_smol.fetch import folder_of

_COMMON = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part over new sound "
    "take only little work know place year live me back give most very after thing our just name good sentence man "
    "think say great where help through much before line right too mean old any same tell boy follow came want show "
    "also around form three small set put end does another well large must big even such because turn here why ask "
    "went men read need land different home us move try kind hand picture again change off play spell air away animal "
    "house point page letter mother answer found study still learn should America world total price amount date order "
    "item open save close cancel search settings account email phone address city street invoice receipt table report"
)
COMMON = _COMMON.split()
HELD_OUT_PERCENT = 10
_MONTHS = "January February March April May June July August September October November December"
MONTHS = _MONTHS.split()
UNITS = ("%", "°", " kg", " km", "°C", " mm", "x", " × 2", " GB", "k", "h", "%", " ©", " •")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def is_held_out(word: str) -> bool:
    """Whether a word is kept for evaluation, whatever its case."""
    number = int.from_bytes(hashlib.sha256(f"casa-smol {word.lower()}".encode()).digest()[:4], "big")
    return number % 100 < HELD_OUT_PERCENT


@lru_cache(maxsize=2)
def word_list(split: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Common words and all words of a split ("train" or "held_out")."""
    file = folder_of("debian", "wamerican-small") / "american-english-small"
    every = [word for word in file.read_text().split() if word.isascii()] if file.exists() else COMMON
    chosen = [tuple(word for word in words if is_held_out(word) == (split == "held_out")) for words in (COMMON, every)]
    return chosen[0], chosen[1]


@dataclass(frozen=True)
class Words:
    """Draws texts of one split. Every method takes the generator to draw with."""

    split: str = "train"

    def word(self, rng: Generator) -> str:
        """A word in small letters, but for names: two of five are common ones."""
        common, every = word_list(self.split)
        return pick(rng, common if rng.random() < 0.4 else every)

    def styled(self, rng: Generator) -> str:
        """A word, sometimes as a Title, in CAPITALS, or in mIxed case."""
        word, kind = self.word(rng), rng.random()
        if kind < 0.62:
            return word
        if kind < 0.84:
            return word[:1].upper() + word[1:]
        if kind < 0.96:
            return word.upper()
        return "".join(letter.upper() if rng.random() < 0.5 else letter.lower() for letter in word)

    def phrase(self, rng: Generator, least: int = 1, most: int = 4) -> str:
        """A few words, as labels and titles have them: "Total amount", "SAVE AS", "Order number"."""
        words = [self.word(rng) for _ in range(rng.integers(least, most + 1))]
        kind = rng.random()
        if kind < 0.5:
            return " ".join(words)[:1].upper() + " ".join(words)[1:]
        if kind < 0.75:
            return " ".join(word[:1].upper() + word[1:] for word in words)
        return " ".join(words).upper() if kind < 0.87 else " ".join(words)

    def sentence(self, rng: Generator) -> str:
        """4 to 14 words with marks, now and then a number, a quotation or a bracket."""
        words = [self.word(rng) if rng.random() < 0.9 else self.piece(rng) for _ in range(rng.integers(4, 15))]
        for place in range(1, len(words) - 1):
            kind = rng.random()
            if kind < 0.08:
                words[place] += pick(rng, ",,,;:")
            elif kind < 0.11:
                words[place] = f'"{words[place]}"' if rng.random() < 0.5 else f"({words[place]})"
            elif kind < 0.13:
                words[place] += pick(rng, ("-" + words[-1], "'s", " -", " –", " &", "/" + words[0]))
        return " ".join(words)[:1].upper() + " ".join(words)[1:] + pick(rng, "......?!:")

    def piece(self, rng: Generator) -> str:
        """A piece of writing that is no word: a number, price, date, time, code, address."""
        return PIECES[int(rng.integers(len(PIECES)))](self, rng)

    def number(self, rng: Generator) -> str:
        """1 to 7 digits, sometimes grouped, with decimals, a sign or a unit."""
        value = int(rng.integers(10 ** int(rng.integers(1, 8))))
        text = f"{value:,}" if rng.random() < 0.4 else str(value)
        if rng.random() < 0.3:
            text += f".{int(rng.integers(1000)):03d}"[: int(rng.integers(2, 5))]
        if rng.random() < 0.12:
            text = pick(rng, "-+~") + text
        return text + (pick(rng, UNITS) if rng.random() < 0.2 else "")

    def price(self, rng: Generator) -> str:
        """An amount of money, with or without its sign."""
        amount = f"{rng.integers(10 ** int(rng.integers(1, 5))):,}.{rng.integers(100):02d}"
        kind = rng.random()
        if kind < 0.4:
            return amount
        if kind < 0.8:
            return pick(rng, "$$€£") + amount
        return amount.replace(".", ",") + pick(rng, (" €", "€", " EUR", " USD"))

    def date(self, rng: Generator) -> str:
        """A day in one of eight ways of writing it."""
        day, month, year = int(rng.integers(1, 29)), int(rng.integers(1, 13)), int(rng.integers(1960, 2030))
        name, weekday = MONTHS[month - 1], pick(rng, DAYS)
        ways = (
            f"{year}-{month:02d}-{day:02d}", f"{day:02d}/{month:02d}/{year}", f"{day}.{month}.{year}",
            f"{day} {name} {year}", f"{name} {day}, {year}", f"{name[:3]} {day}", f"{month}/{day}/{year % 100:02d}",
            f"{weekday[:3]} {day} {name[:3]} {year}",
        )  # fmt: skip
        return pick(rng, ways)

    def time(self, rng: Generator) -> str:
        """A time of day."""
        hour, minute = int(rng.integers(24)), int(rng.integers(60))
        ways = (f"{hour:02d}:{minute:02d}", f"{hour % 12 or 12}:{minute:02d} {'AM' if hour < 12 else 'PM'}",
                f"{hour:02d}:{minute:02d}:{rng.integers(60):02d}")  # fmt: skip
        return pick(rng, ways)

    def code(self, rng: Generator) -> str:
        """Letters and digits as in order numbers and keys."""
        signs = pick(
            rng, ("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", "0123456789abcdef", "ABCDEFGHJKLMNPQRSTUVWXYZ23456789")
        )
        text = "".join(pick(rng, signs) for _ in range(rng.integers(3, 11)))
        if rng.random() < 0.4:
            middle = int(rng.integers(1, len(text)))
            text = text[:middle] + pick(rng, "-_/.:#") + text[middle:]
        return pick(rng, ("", "", "#", "No. ", "ID ")) + text

    def address(self, rng: Generator) -> str:
        """An e-mail address, a place on the web, a file or a telephone number."""
        one, two = (self.word(rng).lower().replace("'", "") for _ in range(2))
        end = pick(rng, ("com", "org", "net", "io", "de", "co.uk"))
        phone = f"+{rng.integers(1, 99)} {rng.integers(100, 999)} {rng.integers(1000, 9999)}-{rng.integers(100, 999)}"
        file = f"{one}_{two}.{pick(rng, ('py', 'txt', 'pdf', 'json', 'md', 'csv'))}"
        return pick(
            rng, (f"{one}.{two}@{two}.{end}", f"www.{one}{two}.{end}", f"https://{one}.{end}/{two}", phone, file)
        )

    def symbols(self, rng: Generator, characters: str) -> str:
        """Any characters, so that rare ones are met."""
        return "".join(pick(rng, characters) for _ in range(rng.integers(2, 12))).strip() or "?"


PIECES: tuple[Any, ...] = (Words.number, Words.number, Words.price, Words.date, Words.time, Words.code, Words.address)


def pick(rng: Generator, values: Any) -> Any:
    """One of a sequence."""
    return values[int(rng.integers(len(values)))]
