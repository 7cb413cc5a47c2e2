"""Answers to many questions, each what the model says to it alone, with nothing computed twice.

    pictures   encoded and projected to keys and values once, for all questions about them
    prefix     what all texts of a batch begin with is fed once, for one row, and its cache repeated
    batches    questions about the same pictures stand together, those of like cost side by side

An insertion model reads a picture as text: there the prefix has the picture in it, if all of a batch ask about it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from casa.data.pictures import open_one, picture_size
from casa.data.record import BadRecord, Message, Picture
from casa.errors import UserError
from casa.evaluation.questions import AnswerSettings, Question
from casa.models import CasaCache, CasaForConditionalGeneration, CasaProcessor, ImageCache
from casa.models.image_cache import encode_pixels
from casa.settings import near
from casa.threads import settle
from casa.vision import token_grids

BATCH_PICTURES = 64  # of one batch, unless one question has more
ENCODED_AT_ONCE = 16  # pictures
KEPT_BYTES = 2**30  # of pictures' keys and values
MIN_SHARED = 64  # tokens that feeding a prefix once must save, to be worth a call of its own


@dataclass(frozen=True)
class Asked:
    """A question as the model meets it: token ids, and of each picture where it stands and its key."""

    question: Question
    ids: list[int]
    pictures: list[tuple[int, str]]


class Answerer:
    """One model that answers questions.

    Args:
        model: In evaluation mode.
        processor: Its own.
        settings: How it is asked.
        image_cache: Pictures are looked for there, which other runs have filled, and kept there for these.

    Attributes:
        encoded: Pictures that were opened so far, and went through the encoder unless the cache had them.
    """

    def __init__(
        self,
        model: CasaForConditionalGeneration,
        processor: CasaProcessor,
        settings: AnswerSettings | None = None,
        image_cache: ImageCache | None = None,
    ) -> None:
        self.model, self.processor, self.image_cache = model, processor, image_cache
        self.settings = settings if settings is not None else AnswerSettings()
        self.encoded = 0
        for name in self.settings.template.keys() - processor.template_variables:
            raise UserError(
                f"the chat template knows no {name!r}; {near(name, processor.template_variables, 'it knows')}"
            )
        self._inserts = model.fusion.method == "insertion"
        self._name = "image_features" if self._inserts else "image_keys_values"
        self._kept: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    def batches(self, questions: Sequence[Question]) -> list[list[Question]]:
        """The questions in batches, costly ones first, those about the same pictures together.

        The same questions always give the same batches.
        """
        about: dict[tuple[str, ...], list[Question]] = {}
        for question in questions:
            about.setdefault(question.keys, []).append(question)

        def cost(group: list[Question]) -> tuple[int, int]:
            return _pixels(group[0]), max(len(question.text) for question in group)

        found: list[list[Question]] = [[]]
        for group in sorted(about.values(), key=cost, reverse=True):
            # a picture that is text is fed once where it stands in what all rows of a batch begin with
            apart = self._inserts and len(group) > 1
            if apart:
                found.append([])
            for question in group:
                shown = sum(len(other.keys) for other in found[-1])
                if len(found[-1]) == self.settings.batch_size or shown + len(question.keys) > BATCH_PICTURES:
                    found.append([])
                found[-1].append(question)
            if apart:
                found.append([])
        return [batch for batch in found if batch]

    def asked(self, question: Question) -> Asked:
        """A question as tokens, through the model's own chat template. Raises BadRecord."""
        chat = [_turn(message) for message in question.messages]
        try:
            text = self.processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=False, **self.settings.template
            )
        except UserError as error:
            raise BadRecord("wrong-type", str(error)) from error
        ids, places = self.processor.text_row(text)
        return Asked(question, ids, list(zip(places, question.keys, strict=True)))

    @torch.no_grad()
    def answer(self, questions: Sequence[Question]) -> list[str | BadRecord]:
        """An answer to each question of a batch, in order, or why it cannot be asked."""
        settle()
        rows: dict[int, Asked] = {}
        why: dict[int, BadRecord] = {}
        for number, question in enumerate(questions):
            try:
                rows[number] = self.asked(question)
            except BadRecord as bad:
                why[number] = bad
        unread = self._encode([row.question for row in rows.values()])
        for number in [*rows]:
            if (bad := next((unread[key] for key in questions[number].keys if key in unread), None)) is not None:
                why[number] = bad
                del rows[number]
        answers = dict(zip(rows, self._generate([*rows.values()]), strict=True)) if rows else {}
        # those of a batch that is over need not all be kept
        while len(self._kept) > 1 and sum(held.nbytes for held, _ in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return [why[number] if number in why else answers[number] for number in range(len(questions))]

    def _encode(self, questions: Sequence[Question]) -> dict[str, BadRecord]:
        """Makes keys and values of their pictures that are not kept yet; gives those that cannot be read."""
        bad: dict[str, BadRecord] = {}
        opened: dict[str, Any] = {}

        def flush() -> None:
            if opened:
                self._kept |= zip(opened, self._image_side(list(opened.values())), strict=True)
                opened.clear()

        for key, picture in {key: one for q in questions for key, one in zip(q.keys, q.pictures, strict=True)}.items():
            if key in self._kept:
                self._kept.move_to_end(key)
                continue
            try:
                opened[key] = open_one(picture)
            except BadRecord as error:
                bad[key] = error
            if len(opened) == ENCODED_AT_ONCE:
                flush()
        flush()
        return bad

    def _image_side(self, pictures: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """What stands for each picture in a call, and its grid (1, 3)."""
        model = self.model
        self.encoded += len(pictures)
        inputs = self.processor.image_processor(images=list(pictures), return_tensors="pt")
        if self.image_cache is not None:
            places = torch.zeros(len(pictures), 2, dtype=torch.int64)
            each = (model.picked({**inputs, "image_positions": places}, [n]) for n in range(len(pictures)))
            made = [self.image_cache.read(model, one) for one in each]
            return [(one[self._name], one["image_grid_thw"]) for one in made]
        found = encode_pixels(model, inputs)
        grid = found["image_grid_thw"]
        grids = token_grids(model.config.encoder_config, grid)
        lengths = [rows * columns for rows, columns in (grids if self._inserts else model.final_grids(grids))]
        # a view would keep all of its neighbours in memory
        parts = [part.clone() for part in found[self._name].split(lengths)]
        return list(zip(parts, grid.split(1), strict=True))

    def _images(self, places: Sequence[tuple[int, int, str]]) -> dict[str, Tensor]:
        """The image inputs of a call, from (row, index, key) of each."""
        if not places:
            return {}
        held = [self._kept[key] for _, _, key in places]
        return {
            self._name: torch.cat([part for part, _ in held]),
            "image_grid_thw": torch.cat([grid for _, grid in held]),
            "image_positions": torch.tensor([place[:2] for place in places], device=self.model.device),
        }

    def _generate(self, rows: Sequence[Asked]) -> list[str]:
        device = self.model.device
        shared = shared_prefix(rows)
        if shared * (len(rows) - 1) < MIN_SHARED and all(at >= shared for at, _ in rows[0].pictures):
            shared = 0
        cache = self._prefilled(rows[0], shared, len(rows))
        longest = max(len(row.ids) for row in rows) - shared
        tokens, mask, places = [], [], []
        for number, row in enumerate(rows):
            new = row.ids[shared:]
            empty = longest - len(new)
            tokens.append([row.ids[0]] * empty + new)
            mask.append([1] * shared + [0] * empty + [1] * len(new))
            places += [(number, empty + at - shared, key) for at, key in row.pictures if at >= shared]
        inputs = {"input_ids": torch.tensor(tokens, device=device), "attention_mask": torch.tensor(mask, device=device)}
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            if self.settings.temperature:
                torch.manual_seed(self.settings.seed + rows[0].question.index)
            said = self.model.generate(
                **inputs, **self._images(places), past_key_values=cache, **self.settings.of_generate()
            )
        texts = self.processor.tokenizer.batch_decode(said[:, longest:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _prefilled(self, row: Asked, shared: int, rows: int) -> CasaCache:
        """A cache with the first tokens of a row, and the pictures among them, once for each of `rows`."""
        cache = self.model.new_cache()
        if shared:
            places = [(0, at, key) for at, key in row.pictures if at < shared]
            ids = torch.tensor([row.ids[:shared]], device=self.model.device)
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **self._images(places))
            cache.batch_repeat_interleave(rows)
        return cache


def shared_prefix(rows: Sequence[Asked]) -> int:
    """How many tokens all rows begin with, the same pictures among them; every row has one more. 0 of a single row."""
    if len(rows) < 2:
        return 0
    first, *others = rows
    shared = min(len(row.ids) for row in rows) - 1
    for row in others:
        shared = next((at for at in range(shared) if row.ids[at] != first.ids[at]), shared)
        for one, other in zip(first.pictures, row.pictures, strict=False):
            if one != other:
                shared = min(shared, one[0], other[0])
                break
        else:
            more = (*first.pictures[len(row.pictures) :], *row.pictures[len(first.pictures) :])
            shared = min([shared, *(place for place, _ in more)])
    return shared


def _turn(message: Message) -> dict[str, Any]:
    parts = [{"type": "image"} if isinstance(p, Picture) else {"type": "text", "text": p.text} for p in message.parts]
    return {"role": message.role, "content": parts}


def _pixels(question: Question) -> int:
    """Of its pictures, as their headers tell; nothing of those that cannot be read, which costs them later."""
    total = 0
    for picture in question.pictures:
        try:
            width, height = picture_size(picture)
        except BadRecord:
            continue
        total += width * height
    return total
