"""SampleMaker: a record to the samples that are made of it, within a budget."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from casa.data.bad import BadRecord
from casa.data.record import Record, Text
from casa.models import CasaProcessor
from casa.training.samples.budget import Budget
from casa.training.samples.chat import Tokens, chat_tokens, stop_of
from casa.training.samples.grids import PictureGrids, picture_size
from casa.training.samples.live import is_live, live_tokens
from casa.training.samples.oversize import OversizeSettings, join, pieces_of, split
from casa.training.samples.sample import Sample, SizedPicture


class SampleMaker:
    """Makes samples with one processor; can be sent to other processes.

    fold: patches per side of an image token (`fold_of(model.config)`); the processor's merge size if left out.
    stop: the token that ends an answer, where it is not the tokenizer's eos token.
    counts: records, samples, and how many records were "downscaled", "split" or "refused" for their size.
    notes: sentences about answers that the template writes in a way that cannot be learned as it stands.
    least: of the records refused for their size, the smallest budget that would have held some part of one.
    """

    def __init__(
        self,
        processor: CasaProcessor,
        budget: Budget,
        oversize: OversizeSettings | None = None,
        *,
        fold: int | None = None,
        stop: int | None = None,
    ) -> None:
        self.processor, self.budget = processor, budget
        self.oversize = oversize if oversize is not None else OversizeSettings()
        self.grids = PictureGrids(processor.image_processor, fold)
        self.counts: Counter[str] = Counter()
        self.least: Budget | None = None
        self._stop = stop_of(processor, stop)
        self.notes = self._stop.notes
        self._longest = max(map(len, processor.tokenizer.get_vocab()))  # characters of a token

    def __call__(self, record: Record) -> list[Sample]:
        """The record's samples, each within the budget, in order.

        Raises BadRecord if it cannot be made into one, or is over budget and refused. Pieces of a split record that
        are too large by themselves are left out, and counted as "pieces refused".
        """
        self.counts["records"] += 1
        # what is too long by far is not even made into tokens: of 20 MB they would take gigabytes
        whole = None if self._endless(record) else self.make(record)
        found = [whole] if whole is not None and self._fits(whole) else list(self._made_to_fit(record, whole))
        self.counts["samples"] += len(found)
        return found

    def make(self, record: Record, part: int = 0) -> Sample:
        """One sample of the whole record, whatever its size. Raises BadRecord."""
        write = live_tokens if is_live(record.messages) else chat_tokens
        tokens: Tokens = write(record.messages, self.processor, self._stop)
        if not any(tokens.learn[1:]):
            raise BadRecord("empty-answer", "No token is left to learn.")
        pictures = []
        for picture in tokens.pictures:
            grid = self.grids.grid(*picture_size(picture))
            pictures.append(SizedPicture(picture, grid, self.grids.tokens(grid)))
        return Sample(tokens.ids, tokens.learn, tokens.places, tuple(pictures), record.origin, part)

    def needs(self, record: Record, whole: Sample | None = None) -> list[Budget]:
        """What each of the parts takes that a record comes to, once it is split as far, and its pictures are made as
        small, as the settings allow. whole: its sample, if that is made already. Empty for what cannot be told."""
        oversize, budget = self.oversize, self.budget
        if whole is None and not self._endless(record):
            whole = self.make(record)
        too_long = whole is None or whole.text_tokens > budget.text
        kept = oversize.text if too_long else oversize.images
        parts = [record] if kept == "refuse" else [join([piece]) for piece in pieces_of(record)]
        found = []
        for part in parts:
            sample = whole if part is record else self._small(part)
            if sample is not None:
                smaller = self.grids.shrinks and oversize.images == "downscale"
                sample = self._bounded(sample, oversize.least_tokens) if smaller else sample
                found.append(Budget(max(2, sample.text_tokens), max(1, sample.image_tokens)))
        return found

    def _small(self, piece: Record) -> Sample | None:
        """The sample of a piece whatever its size; None if it is endless, or answers nothing."""
        if self._endless(piece):
            return None
        try:
            return self.make(piece)
        except BadRecord:
            return None

    def _fits(self, sample: Sample) -> bool:
        return self.budget.holds(sample.text_tokens, sample.image_tokens)

    def _endless(self, record: Record) -> bool:
        """Whether a record's text is over budget even if all its tokens were the longest there are."""
        texts = (part.text for message in record.messages for part in message.parts if isinstance(part, Text))
        return sum(map(len, texts)) > self.budget.text * self._longest

    def _made_to_fit(self, record: Record, whole: Sample | None) -> Iterator[Sample]:
        too_long = whole is None or whole.text_tokens > self.budget.text
        if whole is not None and not too_long and self.oversize.images == "downscale":
            smaller = self._downscaled(whole)
            if smaller is not None:
                self.counts["downscaled"] += 1
                yield smaller
                return
        refused = (too_long and self.oversize.text == "refuse") or (
            whole is not None and whole.image_tokens > self.budget.image and self.oversize.images == "refuse"
        )
        if refused:
            raise self._refused(record, whole)
        self.counts["split"] += 1
        found = 0
        for piece in split(record, self._piece_fits):
            sample = self._piece(piece, found)
            if sample is None:
                self.counts["pieces refused"] += 1
            else:
                found += 1
                yield sample
        if not found:
            raise self._refused(record, whole)

    def _piece(self, piece: Record, part: int) -> Sample | None:
        """The sample of a piece; None if it is too large, or answers nothing."""
        sample = self._small(piece)
        if sample is None:
            return None
        sample = replace(sample, part=part)
        if not self._fits(sample) and sample.text_tokens <= self.budget.text and self.oversize.images == "downscale":
            smaller = self._downscaled(sample)
            sample = smaller if smaller is not None else sample
        return sample if self._fits(sample) else None

    def _piece_fits(self, piece: Record) -> bool:
        sample = self._small(piece)
        return sample is not None and self._fits(sample)

    def _downscaled(self, sample: Sample) -> Sample | None:
        """The sample with its largest pictures made smaller, all to one bound; None if that cannot help."""
        if not self.grids.shrinks:
            return None
        low, high = self.oversize.least_tokens, max((picture.tokens for picture in sample.pictures), default=0)
        best = self._bounded(sample, low)
        if best.image_tokens > self.budget.image:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            tried = self._bounded(sample, middle)
            if tried.image_tokens <= self.budget.image:
                best, low = tried, middle
            else:
                high = middle - 1
        return best

    def _bounded(self, sample: Sample, most: int) -> Sample:
        pictures = []
        for sized in sample.pictures:
            if sized.tokens > most:
                grid = self.grids.grid(*picture_size(sized.picture), most)
                sized = SizedPicture(sized.picture, grid, self.grids.tokens(grid), most)
            pictures.append(sized)
        return Sample(sample.ids, sample.learn, sample.places, tuple(pictures), sample.origin, sample.part)

    def _refused(self, record: Record, whole: Sample | None) -> BadRecord:
        """whole: None for a record that was not even made into tokens."""
        self.counts["refused"] += 1
        held = self.budget
        least = smallest(self.needs(record, whole), held)
        if least is not None:
            self.least = smallest([least, *([self.least] if self.least is not None else [])], held)
        if whole is None:
            return BadRecord("over-budget", f"It has far more text than the {held.text} tokens of a pack: shorten it.")
        hint = f" ({least.text} and {least.image} would hold {self._part(least, whole)})" if least is not None else ""
        return BadRecord(
            "over-budget",
            f"It has {whole.text_tokens} text and {whole.image_tokens} image tokens; a pack holds {held.text} and "
            f"{held.image}: raise the budget{hint}, or let it be split or downscaled.",
        )

    @staticmethod
    def _part(held: Budget, whole: Sample) -> str:
        return "it" if held.holds(whole.text_tokens, whole.image_tokens) else "a part of it"


def smallest(needs: Iterable[Budget], held: Budget) -> Budget | None:
    """The one that asks least of a budget for being raised; None of none."""
    return min(needs, key=lambda need: max(need.text / held.text, need.image / held.image), default=None)
