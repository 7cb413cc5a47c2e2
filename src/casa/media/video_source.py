"""The decoder under `video.py`: one opened video stream, its packets, its clock, and its pictures upright.

Everything that can be refused is refused when the file is opened, as one plain sentence.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from casa.errors import UserError
from casa.media.pictures import MAX_PIXELS, over_white
from casa.media.pyav import import_av
from casa.media.sniff import looks_like_text, read_head

# File kinds that Pillow reads, as a video of one frame.
STILLS = ("png", "jpeg", "webp", "bmp", "tiff", "avif")


def sniff(path: str | os.PathLike[str]) -> str:
    """The kind of still picture the file is, or "video"; refuses what cannot be either."""
    head = read_head(path, "video")
    if looks_like_text(head):
        raise UserError(f"{path} is a text file, not a video: name a video file.")
    kinds = {
        "png": head.startswith(b"\x89PNG"),
        "jpeg": head.startswith(b"\xff\xd8\xff"),
        "webp": head[:4] == b"RIFF" and head[8:12] == b"WEBP",
        "bmp": head.startswith(b"BM"),
        "tiff": head.startswith((b"II*\0", b"MM\0*")),
        "avif": head[4:12] == b"ftypavif",
    }
    return next((kind for kind, found in kinds.items() if found), "video")


class Source:
    """An opened video stream; times are in seconds from the beginning of the file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        av = import_av()
        self._path = path
        self.skipped = 0
        self._failure = av.error.FFmpegError
        # "file:" and the whitelist: a name such as "http:x", or a playlist, must never reach the network
        url = "file:" + os.path.abspath(path)
        try:
            self._container = av.open(url, options={"protocol_whitelist": "file"})
        except (self._failure, ValueError) as error:
            raise UserError(
                f"{path} is no video that can be read, or is damaged or cut off: copy it again or convert it."
            ) from error
        try:
            self.stream = self._choose(path, av.stream.Disposition.attached_pic)
            self._check(path)
            # several frames at once where the codec can: bounded by the number of cores
            self.stream.thread_type = "AUTO"
        except BaseException:
            self._container.close()
            raise
        begin = self._container.start_time
        self._begin = begin / av.time_base if begin is not None else 0.0
        rate = self.stream.average_rate or self.stream.guessed_rate or self.stream.base_rate
        self.rate = float(rate) if rate else 25.0
        aspect = self.stream.sample_aspect_ratio
        # where the stream does not say, or says nonsense, pixels are square
        self.aspect = float(aspect) if aspect and 0.1 <= aspect <= 10 else 1.0
        if self.stream.duration is not None and self.stream.time_base:
            last = (self.stream.start_time or 0) + self.stream.duration
            self.duration = float(last * self.stream.time_base) - self._begin
        elif self._container.duration is not None:
            self.duration = self._container.duration / av.time_base
        else:
            self.duration = self.stream.frames / self.rate if self.stream.frames else math.inf

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exception: object) -> None:
        self._container.close()

    def seek(self, time: float) -> None:
        """Go to the last key frame at or before `time`; without an index, stay at the beginning."""
        target = int((time + self._begin) / float(self.stream.time_base))
        try:
            self._container.seek(target, stream=self.stream, backward=True)
        except self._failure:
            # a failed seek may leave the reader anywhere
            self._container.close()
            self.__init__(self._path)

    def frames(self):
        """(time, raw frame, how long it is shown if it is the last), damaged packets passed over."""
        for count, raw in enumerate(self._decode()):
            time = count / self.rate if raw.pts is None else float(raw.pts * raw.time_base) - self._begin
            length = float(raw.duration * raw.time_base) if raw.duration and raw.time_base else 1 / self.rate
            yield time, raw, length

    def _decode(self):
        packets = self._container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
            except self._failure:
                # the container itself ends in damage: give what the decoder still holds
                self.skipped += 1
                yield from self._flush()
                return
            if packet is None:
                return
            try:
                decoded = packet.decode()
            except self._failure:
                self.skipped += 1
                continue
            for raw in decoded:
                # frames that the decoder patched up show smeared rubbish: the one before stays on screen
                if raw.is_corrupt:
                    self.skipped += 1
                else:
                    yield raw

    def _flush(self):
        try:
            yield from self.stream.decode(None)
        except self._failure:
            self.skipped += 1

    def _choose(self, path: object, attached_picture: Any) -> Any:
        # the cover of a song is a "video" stream too
        streams = [s for s in self._container.streams.video if not s.disposition & attached_picture]
        if streams:
            return streams[0]
        if self._container.streams.audio:
            raise UserError(f"{path} holds sound but no video: name a video file.")
        raise UserError(f"{path} holds no video: name a video file.")

    def _check(self, path: str | os.PathLike[str]) -> None:
        codec = self.stream.codec_context
        if codec is None:
            raise UserError(f"{path} holds a video of an unknown kind: convert it to MP4 (H.264).")
        if codec.width * codec.height > MAX_PIXELS:
            raise UserError(f"{path} is {codec.width} x {codec.height} pixels: make it smaller first.")
        if min(codec.width, codec.height) < 1:
            raise UserError(f"{path} has no picture size: it is damaged or cut off, so copy it again.")
        if "mp4" in self._container.format.name:
            # MP4 tells where every packet lies, so a copy that ended early shows before it is read
            entries = getattr(self.stream, "index_entries", None) or ()
            if max((entry.pos + entry.size for entry in entries), default=0) > Path(path).stat().st_size:
                raise UserError(f"{path} is cut off: copy or download it again.")


def upright(raw: Any, aspect: float) -> tuple[Image.Image, int]:
    """A decoded frame as a PIL image, mode RGB, square pixels, upright; and the degrees it was turned.

    `aspect` is the width of one stored pixel over its height.
    """
    # what is not tagged follows custom: BT.709 from 720 lines on, BT.601 below
    unmarked_hd = raw.colorspace == 2 and raw.height >= 720 and raw.format.name.startswith("yuv")
    if any(component.is_alpha for component in raw.format.components):
        image = over_white(Image.fromarray(raw.to_ndarray(format="rgba")))
    else:
        image = Image.fromarray(raw.to_ndarray(format="rgb24", src_colorspace=1 if unmarked_hd else None))
    if aspect != 1:
        wide = (max(1, round(image.width * aspect)), image.height)
        image = image.resize(wide, Image.Resampling.BICUBIC)

    matrix = raw.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image, 0
    # The upper left 2 x 2 of the matrix, as rows: x' = a x + c y and y' = b x + d y, y pointing down.
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(matrix), dtype=np.int32)[:5])
    swapped = abs(b) + abs(c) > abs(a) + abs(d)
    if swapped:
        image = image.transpose(Image.Transpose.TRANSPOSE)
        a, d = c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if swapped:
        return image, 90 if a < 0 else 270
    return image, 180 if d < 0 else 0
