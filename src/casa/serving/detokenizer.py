"""Tokens back to text, for an answer that is told while it is said: what has been told is never taken back.

A later token can change the end of a text: it completes a character of several bytes, or the tokenizer takes a blank
out before it (" n" and "'t" are "n't"). So of every text there is a part that is settled:

    tokens     I   do   n  't   know   \\xe2  \\x82      the last two are two thirds of a character
    settled    "I don't know"                         the beginning of `whole`, whatever comes
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from casa.streaming.together import UNFINISHED

BYTE = re.compile("<0x([0-9A-F]{2})>")  # a token that stands for one byte, where the vocabulary has no other
BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
# What transformers takes a blank out of (`clean_up_tokenization`), in its order: one pass over the text each.
BLANKS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
# Decoders of the tokenizers library that read a token by itself, or put tokens end to end.
BY_TOKEN = {"BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}


class Detokenizer:
    """What the tokens of an answer say, special ones left out. Reads the tokenizer, and keeps no text.

    A tokenizer that decodes in a way unknown here settles nothing before the end.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._left_out = frozenset([*tokenizer.all_special_ids, *(token for token, about in added if about.special)])
        decoders = _decoders(tokenizer)
        self._kinds = {part["type"] for part in decoders}
        self._cleans = _cleans(tokenizer)
        probe = "a".join(BLANKS) + "a"
        self._is_known = _only_adds(decoders) and (
            not self._cleans or tokenizer.clean_up_tokenization(probe) == _cleaned(probe)
        )

    def whole(self, tokens: Sequence[int]) -> str:
        """The text of an answer that has ended."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True).lstrip()

    def settled(self, tokens: Sequence[int]) -> str:
        """The part of the text that is the beginning of `whole` with any tokens behind these."""
        if not self._is_known:
            return ""
        end = len(tokens)
        while end and self._may_join(tokens[end - 1]):
            end -= 1
        text = self._tokenizer.decode(list(tokens[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = text.rstrip(UNFINISHED)
        return (_cleaned(text) if self._cleans else text).lstrip()

    def spelling(self, token: int) -> tuple[str, bytes]:
        """What one token adds in the middle of a text, special ones as they are written: as text, and its bytes.

        The bytes of all tokens together are those of the text, as it was before blanks were taken out; a single token
        may be less than a character.
        """
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row of the model's vocabulary that the tokenizer knows nothing of
            return "", b""
        if "ByteFallback" in self._kinds and (one := BYTE.fullmatch(piece)) is not None:
            data = bytes([int(one[1], 16)])
        elif "ByteLevel" in self._kinds and all(letter in BYTES for letter in piece):
            data = bytes(BYTES[letter] for letter in piece)
        else:
            # the first token of a text may lose a blank, the second does not
            alone, twice = (
                self._tokenizer.decode([token] * count, clean_up_tokenization_spaces=False) for count in (1, 2)
            )
            data = twice[len(alone) :].encode()
        return data.decode(errors="replace"), data

    def _may_join(self, token: int) -> bool:
        """Whether a token and those behind it may be read as one: bytes are, until something else follows."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        return piece is None or token in self._left_out or BYTE.fullmatch(piece) is not None


def begun(text: str, word: str) -> int:
    """How many characters at the end of a text, fewer than all of a word's, are the word's beginning."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)


def _decoders(tokenizer: Any) -> list[dict[str, Any]]:
    """The settings of the tokenizer's decoders, in order; none if it is not of the tokenizers library."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return []
    told = json.loads(decoder.__getstate__())
    return told.get("decoders", [told])


def _only_adds(decoders: list[dict[str, Any]]) -> bool:
    """Whether a token more only adds to the text of those before it, bytes of a character apart."""
    kinds = [part["type"] for part in decoders]
    behind = decoders[kinds.index("Fuse") :] if "Fuse" in kinds else []
    return set(kinds) <= BY_TOKEN and not any(
        part["type"] == "Replace" or (part["type"] == "Strip" and part["stop"]) for part in behind
    )


def _cleans(tokenizer: Any) -> bool:
    """Whether transformers takes blanks out of what this tokenizer decodes; from BPE only if it is told so twice."""
    if not tokenizer.clean_up_tokenization_spaces:
        return False
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return type(model).__name__ != "BPE" or forced


def _cleaned(text: str) -> str:
    """A text without those blanks, up to where more text could make it read otherwise."""
    for blank in BLANKS:
        sure = len(text) - begun(text.split(blank)[-1], blank)
        text = text[:sure].replace(blank, blank.strip())
    return text
