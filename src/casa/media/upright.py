"""A decoded frame as people see it: RGB, the right way up, with square pixels. Shapes: H, W pixels."""

from typing import Any

import numpy as np
from PIL import Image

from casa.media.pictures import as_picture, over_white
from casa.media.pyav import import_av

# FFmpeg's numbers of the colour spaces that it converts. Others (BT.2020 of constant luminance, YCgCo, damage) would be
# refused with a traceback: they are shown as what is not marked.
CONVERTED, UNMARKED = (0, 1, 2, 4, 5, 6, 7, 9), 2
# As many kinds of side data as FFmpeg may have learned since PyAV named them.
UNNAMED = 8


def upright(raw: Any, aspect: float) -> tuple[np.ndarray, int]:
    """A decoded frame (PyAV's, or a PIL image) as uint8 (H, W, 3) with square pixels, upright; and the degrees
    clockwise it was turned, as far as its container says.

    `aspect` is the width of one stored pixel over its height.
    """
    if isinstance(raw, Image.Image):
        return np.array(as_picture(raw)), 0
    if raw.colorspace not in CONVERTED:
        raw.colorspace = UNMARKED
    if raw.color_range not in (0, 1, 2):
        raw.color_range = 0
    # what is not tagged follows custom: BT.709 from 720 lines on, BT.601 below
    unmarked_hd = raw.colorspace == UNMARKED and raw.height >= 720 and raw.format.name.startswith("yuv")
    if any(component.is_alpha for component in raw.format.components):
        picture = np.asarray(over_white(Image.fromarray(raw.to_ndarray(format="rgba"))))
    else:
        picture = raw.to_ndarray(format="rgb24", src_colorspace=1 if unmarked_hd else None)
    if aspect != 1:
        picture = resized(picture, max(1, round(picture.shape[1] * aspect)), picture.shape[0])

    matrix = _matrix(raw)
    if matrix is None:
        return np.ascontiguousarray(picture), 0
    # The upper left 2 x 2 of the matrix, as rows: x' = a x + c y and y' = b x + d y, y pointing down.
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(matrix), dtype=np.int32)[:5])
    swapped = abs(b) + abs(c) > abs(a) + abs(d)
    if swapped:
        picture = picture.transpose(1, 0, 2)
        a, d = c, b
    if a < 0:
        picture = picture[:, ::-1]
    if d < 0:
        picture = picture[::-1]
    degrees = (90 if a < 0 else 270) if swapped else (180 if d < 0 else 0)
    return np.ascontiguousarray(picture), degrees


def _matrix(raw: Any) -> Any:
    """The frame's display matrix as a buffer, None if it has none.

    Asking a frame for its side data ties it in a circle with them (PyAV keeps both in each other), and megabytes of
    pixels would wait for Python's collector. So a frame of a few pixels is asked, which carries the same data.
    """
    # POINT reads only the pixels that it keeps
    small = raw.reformat(16, 16, "gray", interpolation="POINT")
    try:
        return small.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # FFmpeg makes a matrix of an EXIF orientation, and hands over the EXIF data too, of which PyAV has no name
        return _without_unnamed(small).side_data.get("DISPLAYMATRIX")


def _without_unnamed(small: Any) -> Any:
    """A 16 x 16 grey frame without the kinds of side data that PyAV does not know: one of them hides all the others."""
    av = import_av()
    first = max(kind.value for kind in av.sidedata.sidedata.Type) + 1
    graph = av.filter.Graph()
    steps = [graph.add_buffer(width=16, height=16, format="gray", time_base=1)]
    steps += [graph.add("sidedata", mode="delete", type=str(kind)) for kind in range(first, first + UNNAMED)]
    graph.link_nodes(*steps, graph.add("buffersink")).configure()
    graph.push(small)
    return graph.pull()


def resized(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """A picture, uint8 (H, W, 3), in another size: uint8 (height, width, 3). Itself, if it has that size."""
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
