"""Records to samples within a budget: token ids, which of them are learned, and pictures counted before decoding.

    maker = SampleMaker(processor, TokenBudget(text=2048, image=20480), fold=fold_of(model.config))
    for sample in maker(record):     # none, one or, where a record was split, several
        sample.text_tokens, sample.image_tokens

What a picture will cost is told by its header and the rules of its image processor, which are transformers' own:

    header 1000 x 700 px  ->  resized 1008 x 700  ->  50 x 72 patches  ->  25 x 36 = 900 tokens
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from casa.data.pictures import picture_size
from casa.data.record import BadRecord, Message, Origin, Picture, Record, Text
from casa.errors import UserError
from casa.models import CasaProcessor
from casa.models.image_processing_casa import CasaFlexibleImageProcessor, CasaSquareImageProcessor, bounds
from casa.training.chat_samples import answer_stop, chat_tokens, live_tokens
from casa.training.config import OversizeSettings, TokenBudget
from casa.vision import spec_of


@dataclass(frozen=True)
class SizedPicture:
    """A picture and what it will cost.

    Attributes:
        grid: Rows and columns of patches, as its header tells.
        tokens: Image tokens.
        max_tokens: It is made smaller until it has at most so many; None leaves that to the image processor.
    """

    picture: Picture
    grid: tuple[int, int]
    tokens: int
    max_tokens: int | None = None


@dataclass(frozen=True)
class TrainingSample:
    """One sample: its tokens, which of them the model learns, and where its pictures stand.

        ids      <user> <frame> Read it . <end> <assistant> 4 0 7 <end>
        learn                                               + + +  +
        places         ^ the picture stands before <frame>

    Pictures are named and sized, not opened: that is done when the sample's pack is put together.

    Attributes:
        ids: Token ids.
        learn: Which of them the loss counts.
        places: Per picture, the index before which it stands. Places rise, and text follows every picture.
        part: Which piece of its record this is.
        record: The number of that record in its reader's order.
    """

    ids: tuple[int, ...]
    learn: tuple[bool, ...]
    places: tuple[int, ...]
    pictures: tuple[SizedPicture, ...]
    origin: Origin
    part: int = 0
    record: int = 0

    def __post_init__(self) -> None:
        assert len(self.learn) == len(self.ids)
        assert len(self.pictures) == len(self.places)
        # in a packed row, a picture behind a sample's text would be the next sample's
        assert all(0 <= place < len(self.ids) for place in self.places)

    @property
    def text_tokens(self) -> int:
        return len(self.ids)

    @property
    def image_tokens(self) -> int:
        return sum(picture.tokens for picture in self.pictures)

    @property
    def learned(self) -> int:
        """How many tokens the loss counts; nothing predicts the first."""
        return sum(self.learn[1:])

    @property
    def held_bytes(self) -> int:
        """Memory of its pictures: frames of videos, which are kept encoded; those that are files take none."""
        held = (sized.picture.source for sized in self.pictures)
        return sum(len(source) for source in held if isinstance(source, bytes))


def fold_of(config: Any) -> int:
    """Patches per side of one image token, by the config of a casa model: the encoder's merge times the connector's."""
    connector = getattr(config.text_config, "scale_factor", 1) if config.vision_config is None else 1
    return spec_of(config.encoder_config).merge(config.encoder_config) * connector


class PictureGrids:
    """Patches and image tokens of pictures, for one image processor.

    Args:
        fold: Patches per side of one image token (`fold_of`); the processor's merge size if left out.

    Raises:
        UserError: An image processor whose sizes casa does not know.
    """

    def __init__(self, image_processor: Any, fold: int | None = None) -> None:
        self._processor = image_processor
        self.fold = fold if fold is not None else getattr(image_processor, "merge_size", 1)
        kinds = (Qwen2VLImageProcessorPil, CasaFlexibleImageProcessor, CasaSquareImageProcessor)
        self._tells = hasattr(image_processor, "patch_grid")
        if not (self._tells or isinstance(image_processor, kinds)):
            raise UserError(
                f"casa cannot tell the size that {type(image_processor).__name__} gives a picture; make the processor "
                "with casa's processor_for or processor_of."
            )

    @property
    def shrinks(self) -> bool:
        """Whether a picture can be given fewer tokens."""
        return not isinstance(self._processor, CasaSquareImageProcessor)

    def sized(self, picture: Picture, max_tokens: int | None = None) -> SizedPicture:
        """A picture with what it costs. Raises BadRecord for one without a readable header, or too elongated."""
        grid = self.grid(*picture_size(picture), max_tokens)
        return SizedPicture(picture, grid, self.tokens(grid), max_tokens)

    def grid(self, width: int, height: int, max_tokens: int | None = None) -> tuple[int, int]:
        """Rows and columns of patches of a picture of that size in px. Raises BadRecord for one too elongated."""
        processor, kwargs = self._processor, self.arguments(max_tokens)
        if self._tells:
            return processor.patch_grid(height, width, **kwargs)
        patch = processor.patch_size
        if isinstance(processor, Qwen2VLImageProcessorPil):
            size = kwargs.get("size", processor.size)
            factor = patch * processor.merge_size
            try:
                rows, columns = smart_resize(height, width, factor, size["shortest_edge"], size["longest_edge"])
            except (ValueError, ZeroDivisionError) as error:
                raise BadRecord(
                    "unreadable-picture", f"A picture of {width} x {height} px is too elongated."
                ) from error
        elif isinstance(processor, CasaFlexibleImageProcessor):
            patches = kwargs.get("max_num_patches", processor.max_num_patches)
            rows, columns = get_image_size_for_max_num_patches(height, width, patch, patches)
        else:
            rows, columns = processor.size["height"], processor.size["width"]
        return rows // patch, columns // patch

    def tokens(self, grid: tuple[int, int]) -> int:
        """Image tokens of a grid of patches."""
        return (grid[0] // self.fold) * (grid[1] // self.fold)

    def arguments(self, max_tokens: int | None) -> dict[str, Any]:
        """What the image processor must be told so that a picture has at most so many tokens."""
        if max_tokens is None or not self.shrinks:
            return {}
        processor, patches = self._processor, max_tokens * self.fold**2
        if self._tells:
            return processor.at_most(patches)
        patch = processor.patch_size**2
        flexible = isinstance(processor, CasaFlexibleImageProcessor)
        own = processor.max_num_patches * patch if flexible else processor.size["longest_edge"]
        return bounds(processor, max_pixels=min(patches * patch, own))


class SampleMaker:
    """Makes the samples of records with one processor; can be sent to other processes.

    Args:
        fold: Patches per side of an image token (`fold_of(model.config)`); the processor's merge size if left out.
        stop: The token that ends an answer, where it is not the tokenizer's eos token.

    Attributes:
        counts: Records, samples, and how many records were "downscaled", "split" or "refused" for their size.
        notes: Sentences about answers that the template writes in a way that cannot be learned as it stands.
        least, most: Of the records refused for their size, the budget that would hold some part of one, and all parts.
    """

    def __init__(
        self,
        processor: CasaProcessor,
        budget: TokenBudget,
        oversize: OversizeSettings | None = None,
        *,
        fold: int | None = None,
        stop: int | None = None,
    ) -> None:
        self.processor, self.budget = processor, budget
        self.oversize = oversize if oversize is not None else OversizeSettings()
        self.grids = PictureGrids(processor.image_processor, fold)
        self.counts: Counter[str] = Counter()
        self.least: TokenBudget | None = None
        self.most: TokenBudget | None = None
        self._stop = answer_stop(processor, stop)
        self.notes = self._stop.notes
        self._longest = max(map(len, processor.tokenizer.get_vocab()))  # characters of a token

    def __call__(self, record: Record) -> list[TrainingSample]:
        """The record's samples, each within the budget, in order.

        Pieces of a split record that are too large by themselves are left out, and counted as "pieces refused".

        Raises:
            BadRecord: It cannot be made into a sample, or is over budget and refused.
        """
        self.counts["records"] += 1
        # what is too long by far is not even made into tokens: of 20 MB they would take gigabytes
        whole = None if self._endless(record) else self.make(record)
        fitted = self._fitted(whole)
        if fitted is not None and fitted is not whole:
            self.counts["downscaled"] += 1
        found = [fitted] if fitted is not None else self._pieces(record, whole)
        self.counts["samples"] += len(found)
        return found

    def make(self, record: Record) -> TrainingSample:
        """One sample of the whole record, whatever its size. Raises BadRecord."""
        write = live_tokens if record.is_live else chat_tokens
        tokens = write(record.messages, self.processor, self._stop)
        if not any(tokens.learn[1:]):
            raise BadRecord("empty-answer", "No token is left to learn.")
        pictures = tuple(self.grids.sized(picture) for picture in tokens.pictures)
        return TrainingSample(tuple(tokens.ids), tuple(tokens.learn), tuple(tokens.places), pictures, record.origin)

    def _make_piece(self, piece: Record) -> TrainingSample | None:
        """The sample of a piece whatever its size; None if it is endless, or answers nothing."""
        try:
            return None if self._endless(piece) else self.make(piece)
        except BadRecord:
            return None

    def _endless(self, record: Record) -> bool:
        """Whether a record's text is over budget even if all its tokens were the longest there are."""
        texts = (part.text for message in record.messages for part in message.parts if isinstance(part, Text))
        return sum(map(len, texts)) > self.budget.text * self._longest

    def _pieces(self, record: Record, whole: TrainingSample | None) -> list[TrainingSample]:
        """The samples of a record that does not fit; whole: None if it is endless."""
        too_long = whole is None or whole.text_tokens > self.budget.text
        too_large = whole is not None and whole.image_tokens > self.budget.image
        if (too_long and self.oversize.text == "refuse") or (too_large and self.oversize.images == "refuse"):
            raise self._refused(record, whole, too_long)
        self.counts["split"] += 1
        pieces = [self._fitted(self._make_piece(piece)) for piece in split(record, self._piece_fits)]
        found = [sample for sample in pieces if sample is not None]
        if refused := len(pieces) - len(found):
            self.counts["pieces refused"] += refused
        if not found:
            raise self._refused(record, whole, too_long)
        return [replace(sample, part=part) for part, sample in enumerate(found)]

    def _fits(self, sample: TrainingSample) -> bool:
        return self.budget.holds(sample.text_tokens, sample.image_tokens)

    def _piece_fits(self, piece: Record) -> bool:
        sample = self._make_piece(piece)
        return sample is not None and self._fits(sample)

    def _fitted(self, sample: TrainingSample | None) -> TrainingSample | None:
        """The sample, with its largest pictures made smaller, all to one bound, if it would not fit; None if that
        cannot help, or may not."""
        if sample is None or self._fits(sample):
            return sample
        if sample.text_tokens > self.budget.text or not self._downscales:
            return None
        sizes = range(self.oversize.min_tokens, max(picture.tokens for picture in sample.pictures) + 1)
        fit = bisect_right(sizes, self.budget.image, key=lambda size: self._bounded(sample, size).image_tokens)
        return self._bounded(sample, sizes[fit - 1]) if fit else None

    @property
    def _downscales(self) -> bool:
        return self.grids.shrinks and self.oversize.images == "downscale"

    def _bounded(self, sample: TrainingSample, bound: int) -> TrainingSample:
        sized = (p if p.tokens <= bound else self.grids.sized(p.picture, bound) for p in sample.pictures)
        return replace(sample, pictures=tuple(sized))

    def _refused(self, record: Record, whole: TrainingSample | None, too_long: bool) -> BadRecord:
        """Counts what a record would need. whole: None for a record that was not even made into tokens."""
        self.counts["refused"] += 1
        held, needs = self.budget, self._needs(record, whole, too_long)

        def asks(need: TokenBudget) -> float:
            return max(need.text / held.text, need.image / held.image)

        least = min(needs, key=asks, default=None)
        if least is not None:
            self.least = least if self.least is None else min(least, self.least, key=asks)
            every = needs if self.most is None else [*needs, self.most]
            self.most = TokenBudget(max(need.text for need in every), max(need.image for need in every))
        if whole is None:
            return BadRecord("over-budget", f"It has far more text than the {held.text} tokens of a pack: shorten it.")
        hint = ""
        if least is not None:
            part = "it" if least.holds(whole.text_tokens, whole.image_tokens) else "a part of it"
            hint = f" ({least.text} and {least.image} would hold {part})"
        return BadRecord(
            "over-budget",
            f"It has {whole.text_tokens} text and {whole.image_tokens} image tokens; a pack holds {held.text} and "
            f"{held.image}: raise the budget{hint}, or let it be split or downscaled.",
        )

    def _needs(self, record: Record, whole: TrainingSample | None, too_long: bool) -> list[TokenBudget]:
        """What each of the parts takes that a record comes to, once it is split as far, and its pictures are made as
        small, as the settings allow. Empty for what cannot be told."""
        refuses = self.oversize.text == "refuse" if too_long else self.oversize.images == "refuse"
        parts = [whole] if refuses else [self._make_piece(_joined([piece])) for piece in _pieces_of(record)]
        samples = [sample for sample in parts if sample is not None]
        if self._downscales:
            samples = [self._bounded(sample, self.oversize.min_tokens) for sample in samples]
        return [TokenBudget(max(2, sample.text_tokens), max(1, sample.image_tokens)) for sample in samples]


@dataclass(frozen=True)
class _Piece:
    """A turn (what a user asks and what is answered) or, live, a frame with what is said of it.

    lead: what comes before all pieces: a system message; live, the prompt.
    lent: the pictures of the last turn before that had some, if this one has none: it is about them, most likely.
    """

    record: Record
    lead: tuple[Message, ...]
    messages: tuple[Message, ...]
    lent: tuple[Picture, ...] = ()


def split(record: Record, fits: Callable[[Record], bool]) -> list[Record]:
    """Runs of a record's pieces, each as long as fits; a piece that does not fit alone stands alone."""
    pieces, found, start, low = _pieces_of(record), [], 0, 1
    while start < len(pieces):
        left = len(pieces) - start
        # neighbours are alike: the last run's length is where to look first, and nothing much longer is tried
        high = min(low, left)
        low = 1
        while high < left and fits(_joined(pieces[start : start + high])):
            low, high = high, min(2 * high, left)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(_joined(pieces[start : start + middle])) else (low, middle - 1)
        found.append(_joined(pieces[start : start + low]))
        start += low
    return found


def _joined(pieces: Sequence[_Piece]) -> Record:
    """Neighbouring pieces as one record. Pictures are lent to the first only: they then stand before all others."""
    first = pieces[0]
    if first.record.is_live:
        said = Message("assistant", tuple(part for piece in pieces for part in piece.messages[0].parts))
        return replace(first.record, messages=(*first.lead, said))
    opening = first.messages[0]
    opening = Message(opening.role, (*first.lent, *opening.parts))
    later = [message for piece in pieces[1:] for message in piece.messages]
    return replace(first.record, messages=(*first.lead, opening, *first.messages[1:], *later))


def _pieces_of(record: Record) -> list[_Piece]:
    """The smallest pieces that a record can be cut into: turns, or frames with their words.

    Questions in mid-stream are left out.
    """
    found: list[_Piece] = []
    if not record.is_live:
        lead, turns = _turns(record.messages)
        shown: tuple[Picture, ...] = ()
        for turn in turns:
            own = tuple(part for message in turn for part in message.parts if isinstance(part, Picture))
            found.append(_Piece(record, lead, tuple(turn), () if own else shown))
            shown = own or shown
        return found
    said = [number for number, message in enumerate(record.messages) if message.role == "assistant"]
    frames: list[list[Text | Picture]] = []
    early: list[Text | Picture] = []
    for part in (part for number in said for part in record.messages[number].parts):
        if isinstance(part, Picture):
            frames.append([part, *early])
            early = []
        else:
            (frames[-1] if frames else early).append(part)
    lead = record.messages[: said[0]]
    return [_Piece(record, lead, (Message("assistant", tuple(frame)),)) for frame in frames]


def _turns(messages: Sequence[Message]) -> tuple[tuple[Message, ...], list[list[Message]]]:
    """The system messages at the beginning, and the turns behind them."""
    start = next((number for number, message in enumerate(messages) if message.role != "system"), len(messages))
    turns: list[list[Message]] = []
    for message in messages[start:]:
        answered = bool(turns) and any(earlier.role == "assistant" for earlier in turns[-1])
        if not turns or (message.role == "user" and answered):
            turns.append([])
        turns[-1].append(message)
    return tuple(messages[:start]), turns
