"""Small tokenizers and chat templates of the kinds that language models have; each goes with any of the other.

gpt2      bytes, merged within words (GPT-2, Qwen)       roberta   the same, with a blank before any text
llama     BPE over SentencePiece's blanks, legacy        first     Unigram, a blank before the text alone
always    Unigram, a blank behind special tokens too     bert      WordPiece, in lower case
words     whole words and marks
"""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from casa.models import CasaProcessor
from casa.testing.tiny import tiny_image_processor

TOKENIZERS = ("gpt2", "roberta", "llama", "first", "always", "bert", "words")
SPECIAL_TOKENS = ("<unk>", "<pad>", "<s>", "</s>", "<user>", "<assistant>", "<end>", "<image>")
SENTENCES = (
    "User: Read line 2 of the page, please.\nAssistant: 407\nUser: And what is line 1?\nAssistant: It says 12.",
    "Is image a tag, or / s? A < b > c; the user, an image and the end.",
    "the image the user the end say unk pad  two blanks\n\nline  breaks\t. Answer yes, answer no: 0123456789",
)


_PARTS = (  # of a message's content, with what stands for a picture
    "{{% if message.content is string %}}{{{{ message.content }}}}{{% else %}}{{% for part in message.content %}}"
    "{{% if part.type == 'image' %}}{0}{{% else %}}{{{{ part.text }}}}{{% endif %}}{{% endfor %}}{{% endif %}}"
)
_CHATML = (
    "{{% for message in messages %}}<user>{{{{ message.role }}}}\n{0}<end>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<user>assistant\n{1}{{% endif %}}"
)
TEMPLATES = {
    # Qwen2.5: knows only strings
    "chatml": _CHATML.format("{{ message.content }}", ""),
    # Qwen2-VL: an image part is a place
    "places": _CHATML.format(_PARTS.format("<image>"), ""),
    # SmolVLM: takes nothing but parts
    "parts": (
        "{% for message in messages %}{{ message.role | capitalize }}:{% for part in message.content %}"
        "{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    # Gemma 3: trims, has another token for a picture, and no turn for a system message
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{% set first = (messages[0].content if messages[0].content is string else messages[0].content[0].text) %}"
        "{% set first = first + '\n\n' %}{% set turns = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}{% for message in turns %}"
        "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "<user>{{ 'model' if message.role == 'assistant' else message.role }}\n{{ first if loop.first else '' }}"
        "{% if message.content is string %}{{ message.content | trim }}{% else %}{% for part in message.content %}"
        "{% if part.type == 'image' %}{{ '<start_of_image>' }}{% elif part.type == 'text' %}{{ part.text | trim }}"
        "{% endif %}{% endfor %}{% endif %}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<user>model\n{% endif %}"
    ),
    # Gemma 2, Mistral: refuses a system message; blanks inside the delimiters. The image in this comment is no place.
    "refusing": (
        "{# an image, <image>, is not known here, nor is a system #}{% for message in messages %}"
        "{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% if message.role == 'user' %}<user> {{ message.content.strip() }} <assistant>"
        "{% else %} {{ message.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    # Qwen3: an empty thought before the last answer, none before those of earlier turns, nor at the prompt
    "thinking": (
        "{% for message in messages %}<user>{{ message.role }}\n"
        "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ message.content.split('</think>')[-1].lstrip('\n') }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<user>assistant\n{% endif %}"
    ),
    # a thought that the prompt opens, and a finished chat lacks (DeepSeek-R1)
    "opened": _CHATML.format("{{ message.content.split('</think>')[-1] }}", "<think>\n"),
    # a blank behind the prompt
    "blank": (
        "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}"
    ),
}


def tiny_tokenizer(kind: str, special: Sequence[str] = SPECIAL_TOKENS, **settings: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind of `TOKENIZERS`.

    Args:
        settings: Of PreTrainedTokenizerFast.
        special: How the special tokens are spelled (unknown, padding, beginning, end, and any others); their ids are
            their places here, and all other tokens are the same, however they are spelled.
    """
    unknown, pad, bos, eos = special[:4]
    trainer = None
    shared: dict[str, Any] = {"special_tokens": list(special), "show_progress": False}
    if kind in ("gpt2", "roberta"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "roberta")  # type: ignore
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # type: ignore[assignment]
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, **shared)
    elif kind == "llama":
        tokenizer = Tokenizer(models.BPE(unk_token=unknown, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])  # type: ignore
        trainer = trainers.BpeTrainer(vocab_size=160, **shared)
    elif kind in ("first", "always"):
        texts = ["▁".join(text.split()) for text in SENTENCES]
        pieces = sorted({piece for text in texts for piece in (*text, *text.replace("▁", " ▁").split(), "▁", "\n")})
        scored = [(piece, -2.0 - 1 / len(piece)) for piece in pieces]
        tokenizer = Tokenizer(models.Unigram([(token, 0.0) for token in special] + scored, unk_id=0))
        scheme = "first" if kind == "first" else "always"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # type: ignore[assignment]
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)  # type: ignore[assignment]
    elif kind == "bert":
        split = pre_tokenizers.BertPreTokenizer()
        words = {word for text in SENTENCES for word, _ in split.pre_tokenize_str(text.lower())}
        letters = {f"{before}{letter}" for word in words for letter in word for before in ("", "##")}
        tokenizer = Tokenizer(models.WordPiece(_numbered(special, words | letters), unk_token=unknown))
        tokenizer.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
        tokenizer.pre_tokenizer = split  # type: ignore[assignment]
        tokenizer.decoder = decoders.WordPiece()  # type: ignore[assignment]
    elif kind == "words":
        words = {word for text in SENTENCES for word in text.split()}
        tokenizer = Tokenizer(models.WordLevel(_numbered(special, words), unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    else:
        raise ValueError(f"there is no tiny tokenizer {kind!r}; give one of {', '.join(TOKENIZERS)}")
    tokenizer.add_special_tokens(list(special))
    if trainer is not None:
        tokenizer.train_from_iterator(SENTENCES, trainer)
    names = {"unk_token": unknown, "pad_token": pad, "bos_token": bos, "eos_token": eos}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=list(special[4:]), **{**names, **settings}
    )


def _numbered(special: Sequence[str], words: set[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate([*special, *sorted(words)])}


def tiny_chat_processor(kind: str = "gpt2", template: str = "places", **settings: Any) -> CasaProcessor:
    """A processor with a tokenizer of `TOKENIZERS` and a template of `TEMPLATES`, or the text of one."""
    return CasaProcessor(
        tiny_image_processor(),
        tiny_tokenizer(kind),
        chat_template=TEMPLATES.get(template, template),
        stream_prompt="say it",
        **settings,
    )
