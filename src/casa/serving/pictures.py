"""Pictures from outside: encoded bytes, data: addresses and, where allowed, web addresses become RGB pictures in size.

Format and size are read from the first bytes; what is too large or no picture is refused before it is decoded. Threads
read side by side, none waits for another's picture. A video becomes some of its frames, evenly spaced.
"""

import math
import warnings
from dataclasses import replace
from io import BytesIO
from time import monotonic

from PIL import Image

from casa.errors import UserError
from casa.media.decoder import VideoDecoder, upright
from casa.media.pictures import data_bytes, picture_from, picture_size
from casa.media.sampling import on_screen, spans
from casa.media.source import SourceCounts
from casa.serving.fetch import fetch
from casa.serving.limits import Limits

VIDEO_PICTURES = 4  # whose pixels all frames of a video share
# Bytes that a client sends are read by these and nothing else: a playlist would lead to files of this machine.
VIDEO_OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts", "protocol_whitelist": "data"}


def keep_pillow_quiet() -> None:
    """Leaves Pillow's warnings out, for the whole process: what is too large or damaged is refused in words."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def read_frame(data: bytes, limits: Limits) -> Image.Image:
    """`read_picture` for a frame of a stream, which has at most `limits.frame_pixels`."""
    return read_picture(data, replace(limits, decoded_pixels=min(limits.frame_pixels, limits.decoded_pixels)))


def read_picture(data: bytes, limits: Limits) -> Image.Image:
    """The bytes of a picture file as an upright RGB picture of at most `limits.picture_pixels`. Any thread may call it.

    Raises UserError for what `picture_from` does not read, and for more than `limits.decoded_pixels`.
    """
    _check_pixels("picture", *picture_size(BytesIO(data)), limits)
    return _in_size(picture_from(BytesIO(data)), 1.0, limits)


def read_address(address: str, limits: Limits, allow_fetch: bool) -> Image.Image:
    """The picture behind a data: address, or behind http(s) if fetching is allowed. Raises UserError otherwise."""
    return read_picture(_bytes(address, "picture", limits, allow_fetch), limits)


def read_video(address: str, limits: Limits, allow_fetch: bool, most: int) -> list[Image.Image]:
    """Frames of the video behind an address, as `read_address` takes it: at most `most`, and `limits.video_frames`.

    Of a short one there are `limits.video_fps` a second, of a longer one fewer, evenly spaced. Together they have at
    most the pixels of four pictures. Raises UserError for what is no video, or takes longer than
    `limits.video_seconds` to decode.
    """
    data = _bytes(address, "video", limits, allow_fetch)
    if not is_video(data):
        raise UserError("this is no MP4, WebM, Matroska, AVI or MPEG-TS video; convert it to one of them.")
    clock = _Timed(data, limits.video_seconds)
    damaged = "the video cannot be read, or is damaged; convert it to MP4 (H.264) or WebM."
    most = max(1, min(most, limits.video_frames))
    counts, found = SourceCounts(), []
    try:
        with VideoDecoder(clock, "The video", damaged, counts, options=VIDEO_OPTIONS) as decoder:
            lasts = decoder.duration if 0 < decoder.duration < math.inf else most / limits.video_fps
            fps = min(limits.video_fps, most / lasts)
            for _, raw in on_screen(spans(decoder.frames(), counts), fps):
                if len(found) == most or clock.is_over:
                    break
                # a video may change its size on the way
                _check_pixels("video", round(raw.width * max(1.0, decoder.aspect)), raw.height, limits)
                picture = Image.fromarray(upright(raw, decoder.aspect)[0])
                found.append(_in_size(picture, VIDEO_PICTURES / most, limits))
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of FFmpeg's, at whatever a client sends
        raise UserError(damaged) from error
    if clock.is_over:
        raise UserError(f"the video takes longer than {limits.video_seconds:g} s to decode; send a shorter one.")
    if not found:
        raise UserError(damaged)
    return found


def is_video(data: bytes) -> bool:
    """Whether bytes begin as an MP4, a Matroska or WebM, an AVI or an MPEG-TS does."""
    return data[4:8] == b"ftyp" or data.startswith((b"\x1aE\xdf\xa3", b"RIFF", b"G"))


class _Timed(BytesIO):
    """Bytes that end once so many seconds are over, whatever their reader does with them."""

    def __init__(self, data: bytes, seconds: float) -> None:
        super().__init__(data)
        self._until = monotonic() + seconds

    @property
    def is_over(self) -> bool:
        return monotonic() > self._until

    def read(self, size: int | None = -1) -> bytes:
        return b"" if self.is_over else super().read(size)


def _bytes(address: str, kind: str, limits: Limits, allow_fetch: bool) -> bytes:
    scheme = address[:8].split(":", 1)[0].lower()
    if scheme == "data":
        return data_bytes(address)
    if scheme in ("http", "https"):
        if not allow_fetch:
            raise UserError(f"this server does not fetch {kind}s; send them as data: addresses.")
        return fetch(address, limits, kind)
    example = "image/png" if kind == "picture" else "video/mp4"
    raise UserError(f"a {kind} is given as a data: address, for example data:{example};base64,...")


def _check_pixels(kind: str, width: int, height: int, limits: Limits) -> None:
    if width * height > limits.decoded_pixels:
        raise UserError(
            f"the {kind} is {width} x {height}, but this server takes at most "
            f"{limits.decoded_pixels / 1e6:g} million pixels; make it smaller first."
        )


def _in_size(picture: Image.Image, share: float, limits: Limits) -> Image.Image:
    """The picture with at most this share of `limits.picture_pixels`."""
    scale = math.sqrt(min(1.0, share) * limits.picture_pixels / (picture.width * picture.height))
    if scale >= 1:
        return picture
    size = max(1, int(picture.width * scale)), max(1, int(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)
