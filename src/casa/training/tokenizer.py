"""A small byte-level tokenizer made from the tasks' own text, and the chat template that goes with it.

Any text can be encoded (every byte is a token), and every digit is a token of its own: a number is then said
digit by digit, which is how it is read off a page.

    <user><image><frame>Read line 2.<end><assistant>4071<end>

<image> marks where a picture stands and never reaches the model. <frame> is the delimiter behind a picture: the
token that looks at it, stays in the text, and so carries what was seen (paper v2, D5: the gist token). In a stream
every frame is `<image><frame>`, what is new on it, and `<end>`.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from casa.errors import UserError

PAD, USER, ASSISTANT, END, IMAGE, FRAME = "<pad>", "<user>", "<assistant>", "<end>", "<image>", "<frame>"
SPECIAL = (PAD, USER, ASSISTANT, END, IMAGE, FRAME)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<user>' if message['role'] == 'user' else '<assistant>' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image><frame>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<end>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
)


def build_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocabulary` tokens with merges learned from `texts`; same texts, same tokenizer.

    UserError if the vocabulary is too small for the bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(SPECIAL)
    if vocabulary < least:
        raise UserError(f"a vocabulary of {vocabulary} is too small; bytes and special tokens need {least}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,  # type: ignore[call-arg]
        special_tokens=list(SPECIAL),  # type: ignore[call-arg]
        initial_alphabet=sorted(alphabet),  # type: ignore[call-arg]
        show_progress=False,  # type: ignore[call-arg]
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT, IMAGE, FRAME],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
