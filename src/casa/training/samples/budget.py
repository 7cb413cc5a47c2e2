"""How many tokens a pack holds: text and image tokens, each with a bound of its own (paper, section 4)."""

from dataclasses import dataclass

from casa.settings import require


@dataclass(frozen=True)
class Budget:
    """Tokens of one pack, at most. Image tokens are counted as the tower gives them, before any compressor."""

    text: int = 2048
    image: int = 20_480

    def __post_init__(self) -> None:
        require(self.text >= 2, "text", self.text, "2 tokens or more")
        require(self.image >= 1, "image", self.image, "1 token or more")

    def holds(self, text: int, image: int) -> bool:
        return text <= self.text and image <= self.image


# the paper's, per stage and GPU
BUDGETS = {
    "image": Budget(2048, 20_480),
    "video": Budget(3072, 46_080),
    "live": Budget(3072, 30_720),
}
