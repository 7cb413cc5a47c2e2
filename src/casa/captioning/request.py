"""What is captioned, how, and where to: checked before anything is opened."""

import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from casa.atomic import check_writable
from casa.errors import UserError
from casa.media.sources import is_pipe
from casa.media.streams import is_address, is_device, without_secrets
from casa.media.subtitles import FORMATS
from casa.streaming import Sampling

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv")
# what must be the same for a run to be gone on with, besides model and source
SAME = ("fps", "start", "live", "hold", "cue", "prompt", "max_text_tokens", "max_new_tokens", "seed")


@dataclass(frozen=True)
class TimedQuestion:
    """What is asked of the first frame at or after that second of the stream."""

    seconds: float
    text: str


@dataclass(frozen=True)
class CaptionRequest:
    """One run over one source.

    Args:
        source: As for `casa.media.open_source`.
        out: Caption files, written as it goes.
        burn: A video with the captions drawn in.
        track: The video as it is, with the captions as a text track that players can switch on; of a file only.
        fps: Frames looked at per second.
        start: Seconds, of files and folders.
        end: Seconds, of files and folders.
        live: Keep pace with the clock; None: if the source does.
        hold: Seconds for which a caption stays on screen, unless another comes.
        cue: Captions begin at the time of their "frame", or when they were "said"; None: when they were said in live
            pace.
        prompt: As for `StreamingSession`, and so are `max_text_tokens`, `max_new_tokens`, `sampling` and `seed`.
        questions: Asked in mid-stream.
        resume: Go on from the state that an earlier run left beside the first of `out`.
        save_every: Seconds between states; 0 saves after every frame.
        source_options: FFmpeg's own, for cameras and addresses.
        reconnect_for: For how many seconds a camera or address that broke off is tried again; None: without end if it
            is live.

    Raises:
        UserError: Settings cannot be.
    """

    source: str
    out: tuple[Path, ...] = ()
    burn: Path | None = None
    track: Path | None = None
    fps: float = 2.0
    start: float = 0.0
    end: float | None = None
    live: bool | None = None
    hold: float = 3.0
    cue: str | None = None
    prompt: str | None = None
    max_text_tokens: int | None = None
    max_new_tokens: int = 32
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    questions: tuple[TimedQuestion, ...] = ()
    resume: bool = False
    save_every: float = 5.0
    source_options: dict[str, str] = field(default_factory=dict)
    reconnect_for: float | None = None

    def __post_init__(self) -> None:
        for path in self.out:
            _check_place(path, FORMATS)
        for path in self.videos:
            _check_place(path, VIDEOS)
        written = [os.path.abspath(path) for path in (*self.out, *self.videos)]
        if len(set(written)) < len(written):
            raise UserError("two outputs have the same name; give each its own.")
        if self.track is not None and self.burn is not None and os.path.abspath(self.path) == written[-2]:
            raise UserError("the captioned video would replace the one that the track is copied from; name another.")
        if self.track is not None and not self.is_file:
            raise UserError(
                "track copies a video file and adds text to it; for other sources use burn.", field=("track", "burn")
            )
        if self.resume and not self.out:
            raise UserError(
                "resume goes on from the state beside the caption files; name them with out.", field=("resume", "out")
            )
        if not (math.isfinite(self.hold) and self.hold > 0):
            raise UserError(f"hold is {self.hold}; give a number of seconds above 0.", field="hold")
        if self.cue not in (None, "frame", "said"):
            raise UserError(f"cue is {self.cue}; choose frame or said.", field="cue")
        for name in ("save_every", "reconnect_for"):
            seconds = getattr(self, name)
            if seconds is not None and not seconds >= 0:
                raise UserError(f"{name} is {seconds}; give 0 or more seconds.", field=name)
        if (self.source_options or self.reconnect_for is not None) and not self.is_stream:
            raise UserError(
                "source_options and reconnect_for are for cameras and addresses; leave them out for files and pipes.",
                field=("source_options", "reconnect_for"),
            )

    @property
    def videos(self) -> list[Path]:
        """The videos that are written."""
        return [path for path in (self.burn, self.track) if path is not None]

    @property
    def path(self) -> str:
        """The source, without "file://"."""
        return self.source[len("file://") :] if self.source.lower().startswith("file://") else self.source

    @property
    def is_stream(self) -> bool:
        """Whether the source is a device or an address."""
        return is_device(self.path) or is_address(self.path)

    @property
    def is_file(self) -> bool:
        """Whether the source is one file on disk."""
        return not (self.path == "-" or is_pipe(self.path) or self.is_stream or os.path.isdir(self.path))

    @property
    def can_be_read_again(self) -> bool:
        """Whether the source lies on disk: a file, or a folder of pictures."""
        return self.is_file or os.path.isdir(self.path)

    def identity(self, model: str) -> dict[str, object]:
        """What must be the same for a run to be gone on with; JSON-ready. A file may have moved."""
        path = Path(self.path)
        if is_address(self.path):
            named: object = without_secrets(self.path)
        elif self.is_file:
            named = [path.name, path.stat().st_size if path.is_file() else 0]
        else:
            named = path.name if path.is_dir() else self.path
        questions = [[question.seconds, question.text] for question in self.questions]
        settings = {name: getattr(self, name) for name in SAME}
        return {"model": model, "source": named, **settings, "sampling": asdict(self.sampling), "questions": questions}


def _check_place(path: Path, endings: Iterable[str]) -> None:
    if path.suffix.lower() not in endings:
        raise UserError(f"{path} has no known ending; use {', '.join(endings)}.")
    check_writable(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{path} cannot be written (Permission denied): write to another folder.")
