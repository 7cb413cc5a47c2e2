"""Texts with pictures as hypothesis draws them, for what must hold for every one of them. Needs hypothesis (`dev`)."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from casa.testing.tiny import TinySample

# models are made once and left as they are, so that examples may share what a test was given
SEVERAL = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def texts(draw: st.DrawFn, fewest: int = 0, behind: bool = True, apart: bool = False) -> TinySample:
    """1 to 12 tokens, none of them special, with up to four pictures of 1 to 6 image tokens at any places.

    Args:
        fewest: Pictures.
        behind: One may stand behind all text.
        apart: There is text between any two of them.
    """
    # 0 to 2 are special everywhere, 56 to 59 in the VLMs
    ids = draw(st.lists(st.integers(3, 55), min_size=1, max_size=12))
    last = len(ids) if behind else len(ids) - 1
    places = draw(st.lists(st.integers(0, last), min_size=fewest, max_size=4, unique=apart))
    pictures = [(place, draw(st.integers(1, 2)), draw(st.integers(1, 3))) for place in sorted(places)]
    return TinySample(tuple(ids), tuple(pictures), draw(st.integers(0, 99)))


@st.composite
def texts_in_pieces(draw: st.DrawFn) -> tuple[TinySample, list[int], bool]:
    """A text, where it is cut into calls, and whether a picture at a cut opens the later one (`TinySample.calls`)."""
    sample = draw(texts())
    last = len(sample.ids) - 1
    cuts = draw(st.lists(st.integers(1, last), unique=True, max_size=6)) if last else []
    return sample, sorted(cuts), draw(st.booleans())
