"""SampleMaker: a record to the samples that are made of it, within a budget."""

from collections import Counter
from collections.abc import Iterator

from casa.data.bad import BadRecord
from casa.data.record import Record, Text
from casa.models import CasaProcessor
from casa.training.samples.budget import Budget
from casa.training.samples.chat import Tokens, chat_tokens, stop_of
from casa.training.samples.grids import PictureGrids, picture_size
from casa.training.samples.live import is_live, live_tokens
from casa.training.samples.oversize import OversizeSettings, split
from casa.training.samples.sample import Sample, SizedPicture


class SampleMaker:
    """Makes samples with one processor; can be sent to other processes.

    fold: patches per side of an image token (`fold_of(model.config)`); the processor's merge size if left out.
    stop: the token that ends an answer, where it is not the tokenizer's eos token.
    counts: records, samples, and how many records were "downscaled", "split" or "refused" for their size.
    notes: sentences about answers that the template writes in a way that cannot be learned as it stands.
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
            self.counts["refused"] += 1
            raise _over_budget(whole, self.budget)
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
            self.counts["refused"] += 1
            raise _over_budget(whole, self.budget)

    def _piece(self, piece: Record, part: int) -> Sample | None:
        """The sample of a piece; None if it is too large, or answers nothing."""
        if self._endless(piece):
            return None
        try:
            sample = self.make(piece, part)
        except BadRecord:
            return None
        if not self._fits(sample) and sample.text_tokens <= self.budget.text and self.oversize.images == "downscale":
            smaller = self._downscaled(sample)
            sample = smaller if smaller is not None else sample
        return sample if self._fits(sample) else None

    def _piece_fits(self, piece: Record) -> bool:
        if self._endless(piece):
            return False
        try:
            return self._fits(self.make(piece))
        except BadRecord:
            return False

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


def _over_budget(sample: Sample | None, budget: Budget) -> BadRecord:
    """sample: None for one that was not even made into tokens."""
    if sample is None:
        return BadRecord("over-budget", f"It has far more text than the {budget.text} tokens of a pack: shorten it.")
    return BadRecord(
        "over-budget",
        f"It has {sample.text_tokens} text and {sample.image_tokens} image tokens; a pack holds {budget.text} and "
        f"{budget.image}: raise the budget, or let it be split or downscaled.",
    )
