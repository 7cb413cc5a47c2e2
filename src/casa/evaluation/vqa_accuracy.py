"""VQA accuracy: how many of ten people gave an answer, after the official processing of words (VQA v2, TextVQA).

The rules are those of the VQA challenge's evaluation (Antol et al. 2015, arXiv 1505.00468): lower case, no punctuation,
no articles, numbers as digits, contractions with their apostrophes. An answer that three others gave is right.
"""

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_WHOLE = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# as people write them, one apostrophe left out; the last is the official table's own slip
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _WHOLE.split() for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def vqa_words(text: str) -> str:
    """An answer as VQA accuracy compares it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    given = text = " ".join(text.split())
    for mark in _PUNCTUATION:
        # a mark beside a blank separates nothing more
        text = text.replace(mark, "" if f"{mark} " in given or f" {mark}" in given else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (_DIGITS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The mean over all but one of the references of min(1, matches / 3).

    Of fewer than four references, all but one have to match; of a single one, that one.
    """
    given, people = vqa_words(answer), [vqa_words(reference) for reference in references]
    matches, enough = people.count(given), min(3, max(1, len(people) - 1))
    if len(people) == 1:
        return float(matches)
    return sum(min(1.0, (matches - (one == given)) / enough) for one in people) / len(people)
