"""What a streamed answer has told is never taken back: pieces join to the whole, whatever the tokenizer decodes."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from casa.serving.chat import ChatRequest
from casa.serving.completion import Completion, Detokenizer
from casa.streaming import Sampling
from casa.testing import tiny_casa

SPECIAL = ["<pad>", "<bos>", "<end>"]
EXTRA = "<turn>"  # a special token that stands for nothing
BLANKS = [
    "I",
    " do",
    " n",
    "n't",
    "'t",
    " ",
    "?",
    " ?",
    "!",
    ".",
    " .",
    ",",
    " '",
    "'",
    "' ",
    " :",
    "x",
    " ve",
    "ve",
    "m",
    "s",
]
BLANKS += ["v", "e", "r", "re", "'re", " 're", "  ", "\n", "\ufffd", "é"]  # fmt: skip
BYTES = [f"<0x{byte:02X}>" for byte in (0x41, 0x20, 0x27, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF)]
LETTERS = bytes_to_unicode()
HALVES = ["".join(LETTERS[byte] for byte in part) for part in (b"\xe2\x82", b"\xac", b"\xf0\x9f", b"\x98\x80", b"\xff")]
HALVES += ["".join(LETTERS[byte] for byte in word.encode()) for word in ("I", " do", " n", "'t", " ", "é", " ?")]


def llama(*more):
    return [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *more]


SENTENCE = [word.replace(" ", "\u2581") for word in BLANKS] + BYTES
KINDS = {
    "end to end": (BLANKS, decoders.Fuse()),
    "blanks between": (["I", "do", "n't", "'", ".", "?", "ve", "'s"], None),
    "bytes": (HALVES, decoders.ByteLevel()),
    "SentencePiece": (SENTENCE, decoders.Sequence(llama(decoders.Strip(" ", 1, 0)))),
    "Gemma": (SENTENCE, decoders.Sequence(llama())),
    "Metaspace": (SENTENCE, decoders.Metaspace()),
    "WordPiece": (["I", "do", "##n", "'", "t", ".", "##ve", "'s", "[x]"], decoders.WordPiece("##", True)),
    "BPE": (["I</w>", "do", "n</w>", "'t</w>", "?</w>", "a"], decoders.BPEDecoder("</w>")),
    "replaces late": (BLANKS, decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex(" +"), "_")])),
}
UNTOLD = {"replaces late"}  # where nothing can be told before the end


def made(kind, clean):
    words, decoder = KINDS[kind]
    words = [*SPECIAL, *words]
    table = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="<pad>"))
    if decoder is not None:
        table.decoder = decoder
    table.add_special_tokens([*SPECIAL, EXTRA])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=table, pad_token="<pad>", eos_token="<end>", clean_up_tokenization_spaces=clean
    )
    return tokenizer, [token for token in range(len(tokenizer)) if token != 2]


MADE = {(kind, clean): made(kind, clean) for kind in KINDS for clean in (False, True)}


def told(model, tokenizer, script, stop=(), ended=True):
    """The pieces of an answer of these tokens."""

    class Processor:
        pass

    Processor.tokenizer = tokenizer
    pieces = []
    request = ChatRequest([], len(script) + ended, Sampling(), 0, stop, True, False)
    work = Completion(model, Processor, Detokenizer(tokenizer), request, 9, pieces.append)
    for token in [*script, *[tokenizer.eos_token_id] * ended]:
        if work.choices[0].add(token):
            break
    assert pieces[-1].finish is not None
    return [piece.text for piece in pieces], pieces[-1].finish


@pytest.fixture(scope="module")
def speaker():
    return tiny_casa()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "clean"), MADE)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_pieces_join_to_the_whole(kind, clean, speaker, data):
    tokenizer, vocabulary = MADE[kind, clean]
    # 1,000: a row of the model's vocabulary that the tokenizer does not know
    script = data.draw(st.lists(st.sampled_from([*vocabulary, 1000]), min_size=1, max_size=12))
    whole = tokenizer.decode(script, skip_special_tokens=True).lstrip()
    for ended in (True, False):
        pieces, finish = told(speaker, tokenizer, script, ended=ended)
        assert "".join(pieces) == whole
        assert finish == ("stop" if ended else "length")
    text = Detokenizer(tokenizer)
    for count in range(len(script)):
        assert whole.startswith(text.settled(script[:count]))
    # a stop string shows in no piece, wherever the tokens are cut, and what stands before it is all told
    if whole:
        start = data.draw(st.integers(0, len(whole) - 1))
        stop = whole[start : start + data.draw(st.integers(1, 4))]
        pieces, finish = told(speaker, tokenizer, script, (stop, "never said"))
        assert ("".join(pieces), finish) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize(("kind", "clean"), [key for key in MADE if key[0] not in UNTOLD])
def test_what_is_settled_is_told_at_once(kind, clean, speaker):
    """Plain words need not wait for what comes; a text in one piece would join to the whole as well.

    Where blanks are taken out of what was decoded, all waits for the end.
    """
    tokenizer, vocabulary = MADE[kind, clean]
    plain = next(token for token in vocabulary if tokenizer.convert_ids_to_tokens(token).startswith("I"))
    pieces, _ = told(speaker, tokenizer, [plain] * 4)
    assert len([piece for piece in pieces if piece]) == (1 if clean else 4)


@pytest.mark.parametrize(
    ("script", "pieces"),
    [
        (["I", " do", " n", "'t", " know", " ", "?"], ["I", " do", "n't", " know", "?"]),
        (["x", " =", " '", " ", "'", "!"], ["x", " =", "'", "'!"]),
    ],
)
def test_blanks_that_are_taken_out_were_never_told(script, pieces, speaker):
    words = [*SPECIAL, *dict.fromkeys([*script, "x"])]
    table = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="x"))
    table.decoder = decoders.Fuse()
    table.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=table, eos_token="<end>", clean_up_tokenization_spaces=True)
    said, _ = told(speaker, tokenizer, [words.index(word) for word in script])
    assert "".join(said) == "".join(pieces) == tokenizer.decode([words.index(word) for word in script])


@pytest.mark.parametrize("kind", ["bytes", "SentencePiece", "Gemma"])
def test_the_bytes_of_all_tokens_are_those_of_the_text(kind):
    tokenizer, vocabulary = MADE[kind, False]
    text = Detokenizer(tokenizer)
    ids = [token for token in vocabulary if token not in (0, 1) and tokenizer.convert_ids_to_tokens(token) != EXTRA]
    euro = "€" if kind == "bytes" else None
    script = [tokenizer.convert_tokens_to_ids(piece) for piece in (HALVES[:2] if euro else BYTES[3:6])]
    assert b"".join(text.spelling(token)[1] for token in script) == "€".encode()
    for token in ids:
        written, data = text.spelling(token)
        assert data.decode(errors="replace") == written
        assert data
    do = next(token for token in ids if tokenizer.convert_ids_to_tokens(token)[1:] == "do")
    assert text.spelling(do) == (" do", b" do")
    assert text.spelling(1000) == ("", b"")
