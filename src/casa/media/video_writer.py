"""Video out: pictures in, one H.264 file out, whole or not at all, the same bytes on every run.

What comes only once, as from a camera, is written as it goes instead (`Recorder`): whatever happens, it can be played
as far as it got. Shapes: H, W pixels.
"""

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from PIL import Image

from casa.atomic import replacing
from casa.errors import UserError
from casa.media.decoder import import_av
from casa.media.drawing import draw_caption
from casa.media.pictures import resized
from casa.media.source import Frame, VideoSource
from casa.media.sources import FolderSource
from casa.media.subtitles import Caption, tidy
from casa.media.video import read_frames

if TYPE_CHECKING:  # PyAV is an extra
    import av
    from av.container import OutputContainer
    from av.error import FFmpegError
    from av.video.stream import VideoStream

_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
_ENCODER = "libx264"
_NO_ENCODER = f"This PyAV cannot write {_ENCODER}: install the wheel of av."
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
    """Writes RGB pictures to `path` as a video; to be used in a `with`.

        with VideoWriter("out.mp4", (640, 480), fps=30) as video:
            video.write(image)

    The file appears when the block ends well; if it does not, nothing is left behind. Stored as yuv420p (BT.709).
    Players want even sides, so an odd side gets one more row or column, a copy of the last.

    Args:
        path: Ends in .mp4, .m4v, .mov or .mkv.
        size: (width, height) in pixels of every picture.
        fps: Frames per second.
        crf: Quality, from 0 (lossless) to 51; 23 is customary.
        preset: The encoder's effort, "ultrafast" to "veryslow".
        as_it_goes: Write straight to `path`, over what is there; a file that is never closed can be played, and an
            exception leaves what was written.

    Raises:
        UserError: A setting makes no sense, the path cannot be written, there is no PyAV, or, at the end of the block,
            no frame was written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: tuple[int, int],
        fps: float,
        crf: int = 23,
        preset: str = "veryfast",
        as_it_goes: bool = False,
    ) -> None:
        if min(size) < 1:
            raise UserError(f"A video of {size[0]} x {size[1]} pixels: give a width and height above 0.")
        if not (math.isfinite(fps) and 0 < fps <= 1000):
            raise UserError(f"fps is {fps}: give a number of frames per second above 0, at most 1000.", field="fps")
        if not 0 <= crf <= 51:
            raise UserError(f"crf is {crf}: give a quality from 0 to 51.")
        suffix = Path(path).suffix.lower()
        if suffix not in _FORMATS:
            raise UserError(f"{path} is no video name: let it end in {', '.join(_FORMATS)}.")
        self.size = (int(size[0]), int(size[1]))
        # 29.97 is meant as 30000/1001
        self._rate = Fraction(fps).limit_denominator(1001)
        self._path, self._format = path, _FORMATS[suffix]
        self._av = import_av()
        if _ENCODER not in self._av.codecs_available:
            raise UserError(_NO_ENCODER)
        self._options = {"crf": str(crf), "preset": preset} | ({"tune": "zerolatency"} if as_it_goes else {})
        self._as_it_goes = as_it_goes
        self._stack = ExitStack()
        self._video: tuple[OutputContainer, VideoStream] | None = None
        self._written = 0
        self._last = -1

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            place = self._path if self._as_it_goes else stack.enter_context(replacing(self._path))
            # bit-exact: no version of the library in the file
            options = {"fflags": "+bitexact"} | (_AT_ONCE[self._format] if self._as_it_goes else {})
            container = self._av.open(f"file:{os.fspath(place)}", "w", format=self._format, options=options)
            stack.callback(container.close)
            try:
                stream = container.add_stream(_ENCODER, rate=self._rate, options=self._options)
            except (self._av.error.FFmpegError, ValueError) as error:
                raise UserError(_NO_ENCODER) from error
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
            self._video = container, stream
            self._stack = stack.pop_all()
        return self

    def write(self, image: Image.Image | np.ndarray, time: float | None = None) -> None:
        """Adds one picture.

        Args:
            image: A PIL image, or a uint8 array (H, W, 3), of the size given.
            time: Seconds at which it appears, later than the one before; by default its number / fps.

        Raises:
            ValueError: The size is another, or the time is not after the last.
            UserError: The disk is full.
        """
        if self._video is None:
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

    def close(self) -> None:
        """Ends the file; its last packets are written only now. Raises UserError if the disk is full."""
        try:
            with self._stack:
                if not self._written:
                    raise UserError(f"No frame was written to {self._path}: give the video at least one.")
                self._encode(None)
        except (OSError, self._av.error.FFmpegError) as failure:
            raise self._full(failure) from failure
        finally:
            self._video = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            # the stack closes the container, then removes the file
            self._video = None
            self._stack.__exit__(kind, error, trace)

    def _encode(self, frame: "av.VideoFrame | None") -> None:
        if self._video is not None:
            container, stream = self._video
            try:
                container.mux(stream.encode(frame))
            except (OSError, self._av.error.FFmpegError) as error:
                raise self._full(error) from error

    def _full(self, error: "OSError | FFmpegError") -> UserError:
        return UserError(f"{self._path} cannot be written ({error.strerror}): free some space.")


class Recorder:
    """Writes the frames that pass through it, each with the caption that is on screen, as a video.

        recorder = Recorder("seen.mp4", fps=2)
        for frame in recorder.through(source):
            recorder.say(frame.time, frame.time + 3, text)
        recorder.close()

    A frame is written when the next one comes, so that what was said of it stands in it. `say` and `close` may be
    called from another thread than the one that takes frames. The video can be played as far as it got, also after a
    kill; and it never replaces another: beside `seen.mp4` comes `seen.2.mp4`.

    Args:
        path: As for `VideoWriter`.
        fps: The rate at which frames are expected; their own times count.
        begin: The second at which the video begins, None for that of its first frame, which is otherwise on screen
            from there on.

    Attributes:
        place: Where the video is; None before its first frame.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float, begin: float | None = None) -> None:
        # what cannot be written is refused now, not at the first frame
        VideoWriter(path, (2, 2), fps)
        self._path, self._fps, self._begin = Path(path), fps, begin
        self.place: Path | None = None
        self._video: VideoWriter | None = None
        self._held: Frame | None = None
        self._caption: Caption | None = None
        self._closed = False
        self._lock = threading.Lock()

    def through(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """The frames, recorded on their way."""
        for frame in frames:
            with self._lock:
                self._write()
                self._held = None if self._closed else frame
            yield frame

    def say(self, start: float, end: float, text: str) -> None:
        """Shows a caption from `start` to `end` seconds, or until the next one."""
        said = tidy([Caption(start, end, text)])
        with self._lock:
            self._caption = said[0] if said else self._caption

    def close(self) -> None:
        """Writes the last frame and ends the file; may be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._write()
            finally:
                if self._video is not None:
                    self._video.close()

    def _write(self) -> None:
        frame, self._held = self._held, None
        if frame is None:
            return
        if self._video is None:
            self._begin = frame.time if self._begin is None else self._begin
            self.place = _new_file(self._path)
            self._video = VideoWriter(self.place, frame.image.size, self._fps, as_it_goes=True).__enter__()
            if frame.time > self._begin:
                self._video.write(frame.picture, time=0.0)
        picture, caption = resized(frame.picture, *self._video.size), self._caption
        if caption is not None and caption.start <= frame.time + 1e-3 and frame.time < caption.end:
            picture = np.asarray(draw_caption(Image.fromarray(picture), caption.text))
        self._video.write(picture, time=frame.time - (self._begin or 0.0))


def _new_file(path: Path) -> Path:
    """An empty file at `path`, or, where something is there already, beside it, with a number. Raises UserError."""
    place, number = path, 1
    while True:
        try:
            place.touch(exist_ok=False)  # never what somebody else has just put there
            return place
        except FileExistsError:
            number += 1
            place = path.with_stem(f"{path.stem}.{number}")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): write to another folder.") from error


def burn_captions(
    source_path: str | os.PathLike[str],
    captions: Iterable[Caption],
    out_path: str | os.PathLike[str],
    progress: Callable[[int, int | None], None] | None = None,
    fps: float = 2.0,
) -> None:
    """Writes a video again, with each caption drawn in at its time, and without sound.

    Size, upright rotation and the time of every frame (variable frame rate too) are kept; an odd side grows by one
    pixel, and the last frame lasts one average frame. Of a folder, all pictures become a video, in the size of the
    first.

    Args:
        source_path: A video file, or a folder of pictures.
        captions: What is drawn.
        out_path: May be `source_path`: it is replaced when all is done, and stays as it is if anything fails.
        progress: Called after each frame with (frames done, frames in all or None).
        fps: Pictures of a folder per second.

    Raises:
        UserError: The source cannot be read, or the destination cannot be written.
    """
    cues = tidy(captions)
    current = 0
    frames, size, rate, total = _to_draw_on(source_path, fps)
    with frames, VideoWriter(out_path, size, rate) as video:
        for frame in frames:
            while current < len(cues) and cues[current].end <= frame.time:
                current += 1
            plain = image = Image.fromarray(resized(frame.picture, *size))
            if current < len(cues) and cues[current].start <= frame.time:
                image = draw_caption(plain, cues[current].text)
            if not frame.index and frame.time > 0:
                # the first picture is there from the beginning, or players would take its time for the beginning
                video.write(plain, time=0.0)
            video.write(image, time=max(frame.time, 0.0))
            if progress is not None:
                progress(frame.index + 1, total)


def _to_draw_on(path: str | os.PathLike[str], fps: float) -> tuple[VideoSource, tuple[int, int], float, int | None]:
    """The frames of a video file or of a folder's pictures, their (width, height), rate, and how many there are."""
    if os.path.isdir(path):
        with FolderSource(path, fps) as pictures:
            first = next(pictures, None)
        if first is None:
            raise UserError(f"{path} holds no picture that can be read: check its files.")
        return FolderSource(path, fps), first.image.size, fps, len(pictures.paths)
    frames = read_frames(path, fps=None)
    info = frames.info
    rate = float(Fraction(info.fps).limit_denominator(1001)) if 0 < info.fps <= 1000 else 25.0
    return frames, (info.width, info.height), rate, info.frames
