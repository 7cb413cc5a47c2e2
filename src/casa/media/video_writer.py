"""Video out: pictures in, one H.264 file out, whole or not at all, the same bytes on every run.

What comes only once, as from a camera, is written as it goes instead: whatever happens, it can be played as far as it
got. Frames may come at a constant rate or with their own times. Players want even sides, so an odd side gets one more
row or column, a copy of the last.
"""

import math
import os
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from casa.atomic import replacing
from casa.errors import UserError
from casa.media.pyav import import_av

_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
_ENCODERS = {"h264": "libx264", "hevc": "libx265"}
# Written as it goes, a frame is encoded when it comes, and is on disk, in a piece of its own, when the next one is.
_AT_ONCE = {
    "matroska": {"flush_packets": "1", "cluster_time_limit": "0"},
    # hybrid: an ordinary MP4, once it is closed in good order
    "mp4": {"flush_packets": "1", "movflags": "+frag_every_frame+empty_moov+default_base_moof+hybrid_fragmented"},
}
_AT_ONCE["mov"] = _AT_ONCE["mp4"]
# Ticks per second: the customary clock of video, a multiple of 24, 25, 30 and 60.
_CLOCK = 90_000


class VideoWriter:
    """Write RGB pictures to `path` as a video; to be used in a `with`.

        with VideoWriter("out.mp4", (640, 480), fps=30) as video:
            video.write(image)

    The file appears when the block ends well; if it does not, nothing is left behind. Stored as yuv420p
    (BT.709), with both sides made even by repeating the last row or column.

    Args:
        path: ends in .mp4, .m4v, .mov or .mkv.
        size: (width, height) in pixels of every picture.
        fps: frames per second.
        codec: "h264" or "hevc".
        crf: quality, from 0 (lossless) to 51; 23 is customary.
        preset: the encoder's effort, "ultrafast" to "veryslow".
        as_it_goes: write straight to `path`, over what is there; a file that is never closed can be played, and an
            exception leaves what was written.

    Raises:
        UserError: a setting that makes no sense, a path that cannot be written, no PyAV, or, at the end
            of the block, no frame written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: tuple[int, int],
        fps: float,
        codec: str = "h264",
        crf: int = 23,
        preset: str = "veryfast",
        as_it_goes: bool = False,
    ) -> None:
        if min(size) < 1:
            raise UserError(f"A video of {size[0]} x {size[1]} pixels: give a width and height above 0.")
        if not (math.isfinite(fps) and 0 < fps <= 1000):
            raise UserError(f"fps is {fps}: give a number of frames per second above 0, at most 1000.")
        if codec not in _ENCODERS:
            raise UserError(f"There is no codec {codec!r}: choose {' or '.join(_ENCODERS)}.")
        if not 0 <= crf <= 51:
            raise UserError(f"crf is {crf}: give a quality from 0 to 51.")
        suffix = Path(path).suffix.lower()
        if suffix not in _FORMATS:
            raise UserError(f"{path} is no video name: let it end in {', '.join(_FORMATS)}.")
        self.size = (int(size[0]), int(size[1]))
        # 29.97 is meant as 30000/1001
        self._rate = Fraction(fps).limit_denominator(1001)
        self._path = path
        self._format = _FORMATS[suffix]
        self._encoder = _ENCODERS[codec]
        av = import_av()
        if self._encoder not in av.codecs_available:
            raise UserError(f"This PyAV cannot write {self._encoder}: install the wheel of av.")
        self._options = {"crf": str(crf), "preset": preset} | ({"tune": "zerolatency"} if as_it_goes else {})
        self._as_it_goes = as_it_goes
        self._stack = ExitStack()
        self._av: Any = None
        self._container: Any = None
        self._stream: Any = None
        self._written = 0
        self._last = -1

    def __enter__(self) -> "VideoWriter":
        self._av = import_av()
        with ExitStack() as stack:
            place = self._path if self._as_it_goes else stack.enter_context(replacing(self._path))
            # bit-exact: no version of the library in the file
            options = {"fflags": "+bitexact"} | (_AT_ONCE[self._format] if self._as_it_goes else {})
            self._container = self._av.open(f"file:{os.fspath(place)}", "w", format=self._format, options=options)
            stack.callback(self._container.close)
            try:
                stream = self._container.add_stream(self._encoder, rate=self._rate, options=self._options)
            except (self._av.error.FFmpegError, ValueError) as error:
                raise UserError(f"This PyAV cannot write {self._encoder}: install the wheel of av.") from error
            stream.width, stream.height = (side + side % 2 for side in self.size)
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.time_base = Fraction(1, _CLOCK)
            # Two on every machine: the encoder's output depends on the number of its threads.
            context.thread_count = 2
            # Frames stored in the order in which they are shown: reordered ones make MP4 claim a wrong
            # length where the frame rate varies.
            context.max_b_frames = 0
            # BT.709 and limited range, said in the file, so that no player has to guess
            context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
            self._stream = stream
            self._stack = stack.pop_all()
        return self

    def write(self, image: Image.Image | np.ndarray, time: float | None = None) -> None:
        """Add one picture: PIL image, or uint8 array (H, W, 3), of the size given.

        `time` in seconds is when it appears, later than the one before; by default its number / fps.

        Raises:
            ValueError: another size, or a time that is not after the last.
            UserError: the disk is full.
        """
        if self._stream is None:
            raise RuntimeError("VideoWriter is written to inside its `with` block only")
        pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
        width, height = self.size
        if pixels.shape != (height, width, 3) or pixels.dtype != np.uint8:
            raise ValueError(f"a frame is {pixels.dtype} {pixels.shape}: this video takes uint8 {(height, width, 3)}")
        tick = round((self._written / self._rate if time is None else time) * _CLOCK)
        if tick <= self._last:
            raise ValueError(f"a frame at {tick / _CLOCK:.4f} s is not after the last, {self._last / _CLOCK:.4f} s")
        if width % 2 or height % 2:
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=1)
        frame.pts = tick
        frame.time_base = Fraction(1, _CLOCK)
        frame.duration = round(_CLOCK / self._rate)  # counts for the last frame only
        self._encode(frame)
        self._last = tick
        self._written += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        # the stack closes the container, then renames the file, or removes it if an exception passes
        stack, self._stack = self._stack, ExitStack()
        if kind is not None:
            self._stream = None
            stack.__exit__(kind, error, trace)
            return
        try:
            with stack:
                if not self._written:
                    raise UserError(f"No frame was written to {self._path}: give the video at least one.")
                self._encode(None)
        except (OSError, self._av.error.FFmpegError) as failure:
            # the last packets are written when the container closes
            raise self._full(failure) from failure
        finally:
            self._stream = None

    def _encode(self, frame: Any) -> None:
        try:
            self._container.mux(self._stream.encode(frame))
        except (OSError, self._av.error.FFmpegError) as error:
            raise self._full(error) from error

    def _full(self, error: Any) -> UserError:
        return UserError(f"{self._path} cannot be written ({error.strerror}): free some space.")
