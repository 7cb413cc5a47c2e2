"""What people type is text: the same tokens as from a tokenizer whose special tokens nobody can spell."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from casa.models.chat_template import ChatText, TypedText, free_marks
from casa.testing import SPECIAL_TOKENS, TOKENIZERS, tiny_tokenizer

UNSPELLED = tuple(f"⟦{number}⟧" for number in range(len(SPECIAL_TOKENS)))
PAIRS = {kind: (tiny_tokenizer(kind), tiny_tokenizer(kind, UNSPELLED)) for kind in TOKENIZERS}
WORDS = st.sampled_from(
    [
        *SPECIAL_TOKENS[1:],
        "<ima",
        "ge>",
        "<",
        ">",
        "s",
        "a",
        "The image",
        "line",
        "line 2",
        " ",
        "  ",
        "\n",
        "4",
        "07",
        "é",
        "🙂",
    ]
)
TYPED = st.lists(WORDS, max_size=6).map("".join)
CHAT = st.lists(
    st.tuples(st.sampled_from([*SPECIAL_TOKENS[1:], "Assistant: ", "\n", ""]), TYPED), min_size=1, max_size=4
)


def rendered(typed: TypedText, chat):
    marks = typed.marks([text for _, text in chat])
    return marks.read("".join(written + marks.mark(text) for written, text in chat))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(chat=CHAT)
def test_only_what_the_template_wrote_is_a_special_token(kind, chat):
    tokenizer, unspelled = PAIRS[kind]
    typed = TypedText.of(tokenizer)
    text = rendered(typed, chat)
    assert text == "".join(written + said for written, said in chat)
    names = dict(zip(SPECIAL_TOKENS, UNSPELLED, strict=True))
    wanted = unspelled("".join(names.get(written, written) + said for written, said in chat), add_special_tokens=False)
    assert typed.encode(tokenizer, text) == wanted["input_ids"]
    # the places of tokens, blanks included, are those of the text
    spelled = typed.spell(text)
    assert typed.encode_spelled(spelled).ids == wanted["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(st.sampled_from([*SPECIAL_TOKENS, "The image", "line 2", " ", "\n", "<", "407", "🙂é"])).map("".join)
)
def test_a_plain_text_has_the_tokenizers_own_ids_also_from_the_twin(kind, text):
    tokenizer, _ = PAIRS[kind]
    typed = TypedText.of(tokenizer)
    wanted = tokenizer.encode(text, add_special_tokens=False)
    assert typed.encode(tokenizer, text) == wanted
    # <unk>, typed or not, is what a tokenizer of words makes of anything
    assert typed.encode_spelled(typed.spell(text)).ids == wanted


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_know_where_they_stand_blanks_included(kind):
    tokenizer, _ = PAIRS[kind]
    typed = TypedText.of(tokenizer)
    spelled = typed.spell("<user>Read line 2.<end>\n<assistant> 407<end>")
    encoding = typed.encode_spelled(spelled)
    border = spelled.index(" 407")
    starts = [start for start, _ in encoding.offsets]
    assert starts == sorted(starts)
    behind = [token for token, start in zip(encoding.ids, starts, strict=True) if start >= border]
    assert tokenizer.convert_ids_to_tokens(behind)[-1] == "<end>"
    assert tokenizer.decode(behind[:-1]).strip() == "407"
    if kind not in ("bert", "words"):  # these have no tokens for blanks
        assert min(start for start in starts if start >= border) == border


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        (["<ima", "ge>"], []),
        (["<", "image", ">"], []),
        (["<image", ">"], []),
        (["<IMAGE", ">"], []),
        (["<im<image>age>"], []),
        (["<<end>>"], []),
        (["<image><image>"], []),
    ],
)
def test_texts_in_a_row_do_not_become_a_token(parts, wanted):
    tokenizer, _ = PAIRS["gpt2"]
    typed = TypedText.of(tokenizer)
    for change in (str, str.lower, str.strip, lambda text: text.replace("\n", "")):
        for blanks in ("", "\n"):
            texts = [part + blanks for part in parts]
            marks = typed.marks(texts)
            text = marks.read("".join(change(marks.mark(part)) for part in texts))
            ids = typed.encode(tokenizer, text)
            assert [token for token in ids if token < len(SPECIAL_TOKENS)] == wanted


def test_marks_that_a_template_cuts_or_escapes_leave_nothing_behind():
    tokenizer, _ = PAIRS["gpt2"]
    typed = TypedText.of(tokenizer)
    marks = typed.marks("a <end> b")
    marked = marks.mark("a <end> b")
    for change, written in (
        (lambda text: text[:4], 0),
        (lambda text: text[4:], 0),
        (lambda text: text.split("<end>")[0] + "\n<user>" + text.split("<end>")[1], 1),
        (lambda text: text.replace("<", "&lt;"), 0),
        (lambda text: text.upper(), 0),
        (lambda text: text + "<end>" + text, 1),
        (lambda text: text.encode("ascii", "backslashreplace").decode(), 0),
    ):
        text = marks.read(change(marked))
        assert not set(free_marks(2)) & set(text)
        assert "\\uf8" not in text
        assert sum(token < len(SPECIAL_TOKENS) for token in typed.encode(tokenizer, text)) == written


def test_private_characters_of_a_user_are_text_like_any_other():
    tokenizer, _ = PAIRS["gpt2"]
    typed = TypedText.of(tokenizer)
    said = f"{free_marks(3)}<image>{free_marks(1)}"
    text = rendered(typed, [("<user>", said), ("<end>", "")])
    assert text == f"<user>{said}<end>"
    ids = typed.encode(tokenizer, text)
    assert [token for token in ids if token < len(SPECIAL_TOKENS)] == [4, 6]
    assert tokenizer.decode(ids) == text


def test_tokens_that_are_added_later_are_known():
    tokenizer = tiny_tokenizer("gpt2")
    before = TypedText.of(tokenizer)
    assert TypedText.of(tokenizer) is before
    tokenizer.add_special_tokens({"additional_special_tokens": ["<eye>"]})
    typed = TypedText.of(tokenizer)
    text = rendered(typed, [("<eye>", "an <eye>")])
    ids = typed.encode(tokenizer, text)
    assert ids.count(tokenizer.convert_tokens_to_ids("<eye>")) == 1
    assert tokenizer.decode(ids) == text


def test_added_words_that_are_not_special_stay_tokens_whoever_writes_them():
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.add_tokens(["<think>"])
    typed = TypedText.of(tokenizer)
    text = rendered(typed, [("<user>", "<think> <image>")])
    assert tokenizer.convert_tokens_to_ids("<think>") in typed.encode(tokenizer, text)


def test_roles_and_types_by_which_templates_choose_stay_as_they_are():
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["r_sep", "image"]})
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "her"}]}
    marked = TypedText.of(tokenizer).marks(message).mark(message)
    assert (marked["role"], marked["content"][0]) == ("user", {"type": "image"})
    assert marked["content"][1]["text"] != "her"  # with "_sep" behind it, it would be a token


def test_many_special_tokens_are_told_apart():
    """Also those that begin alike, are the beginning of others, or stand only between words."""
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<unused{number}>" for number in range(300)]})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<unused1", AddedToken("<one>", single_word=True)]})
    typed = TypedText.of(tokenizer)
    for written in ("<unused1>", "<unused12>", "<unused1", "<unused2> <one> ", "a<one>b "):
        for said in ("x", "<unused12>", "<unused1 >", "<one>"):
            text = rendered(typed, [(written, said), ("<unused299>", "")])
            special = {*tokenizer.get_added_vocab().values()}
            found = [token for token in typed.encode(tokenizer, text) if token in special]
            alone = tokenizer.encode(written + "x<unused299>", add_special_tokens=False)
            assert found == [token for token in alone if token in special]


def test_the_spans_travel_with_the_text():
    text = ChatText.of("a <image> b", [(2, 9)])
    again = pickle.loads(pickle.dumps(text))
    assert (again, again.typed) == (text, text.typed)
    assert type(text.strip()) is str


def test_special_tokens_around_a_text_stay_the_tokenizers_own():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    typed = TypedText.of(tokenizer)
    ids = typed.encode(tokenizer, rendered(typed, [("", "a <image>")]), add_special_tokens=True)
    assert (ids[0], ids[-1]) == (2, 3)
    assert 7 not in ids
