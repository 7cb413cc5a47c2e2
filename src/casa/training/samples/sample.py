"""One training sample: its tokens, which of them the model learns, and where its pictures stand.

    ids      <user> <frame> Read it . <end> <assistant> 4 0 7 <end>
    learn                                               + + +  +
    places         ^ the picture stands before <frame>

Pictures are named and sized, not opened: that is done when the sample's pack is put together.
"""

from dataclasses import dataclass

from casa.data.record import Origin, Picture


@dataclass(frozen=True)
class SizedPicture:
    """A picture and what it will cost.

    grid: rows and columns of patches, as its header tells. tokens: image tokens. most_tokens: it is to be made smaller
    until it has at most so many; None leaves that to the image processor.
    """

    picture: Picture
    grid: tuple[int, int]
    tokens: int
    most_tokens: int | None = None


@dataclass(frozen=True)
class Sample:
    """ids: token ids. learn: which of them the loss counts. places: per picture, the index before which it stands.

    Places rise, and text follows every picture. part: which piece of its record this is.
    """

    ids: tuple[int, ...]
    learn: tuple[bool, ...]
    places: tuple[int, ...]
    pictures: tuple[SizedPicture, ...]
    origin: Origin
    part: int = 0

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
