"""What is captioned, how, and where to: checked before anything is opened."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from casa.captioning.questions import Question
from casa.errors import UserError
from casa.media.pipe import is_pipe
from casa.media.streams import is_address, is_device, without_secrets
from casa.streaming import Sampling

SUBTITLES = (".srt", ".vtt", ".jsonl")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv")


@dataclass(frozen=True)
class Request:
    """One run over one source.

    source: as for `casa.media.open_source`. source_options: FFmpeg's own, and reconnect_for: for how many seconds a
    stream that broke off is tried again (None: without end if it is live); both for cameras and addresses only.
    out: caption files, written as it goes. burn: a video with the captions drawn in. track: the video as it is, with
    the captions as a text track that players can switch on; of a file only.
    fps: frames looked at per second. start, end: seconds, of files and folders. live: keep pace with the clock; None:
    if the source does. hold: seconds for which a caption stays on screen, unless another comes. cue: whether captions
    begin at the time of their "frame", or when they were "said"; None: when they were said in live pace.
    prompt, max_text_tokens, max_new_tokens, sampling, seed: as for StreamingSession. questions: asked in mid-stream.
    resume: go on from the state that an earlier run left beside the first of `out`. save_every: seconds between states;
    0 saves after every frame.

    Raises UserError for settings that cannot be.
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
    questions: tuple[Question, ...] = ()
    resume: bool = False
    save_every: float = 5.0
    source_options: dict[str, str] = field(default_factory=dict)
    reconnect_for: float | None = None

    def __post_init__(self) -> None:
        for path in self.out:
            _check_place(path, SUBTITLES)
        for path in (self.burn, self.track):
            if path is not None:
                _check_place(path, VIDEOS)
        written = [Path(os.path.abspath(path)) for path in (*self.out, self.burn, self.track) if path is not None]
        if len(set(written)) < len(written):
            raise UserError("two outputs have the same name; give each its own.")
        if self.track is not None and self.burn is not None and Path(os.path.abspath(self.path)) == written[-2]:
            raise UserError("the captioned video would replace the one that the track is copied from; name another.")
        if self.track is not None and not self.is_file:
            raise UserError("--track copies a video file and adds text to it; for other sources use --burn.")
        if self.resume and not self.out:
            raise UserError("--resume goes on from the state beside the caption files; name them with --out.")
        if not (math.isfinite(self.hold) and self.hold > 0):
            raise UserError(f"hold is {self.hold}; give a number of seconds above 0.")
        if not self.save_every >= 0:
            raise UserError(f"save_every is {self.save_every}; give 0 or more seconds.")
        if self.cue not in (None, "frame", "said"):
            raise UserError(f"cue is {self.cue}; choose frame or said.")
        if self.reconnect_for is not None and not self.reconnect_for >= 0:
            raise UserError(f"reconnect_for is {self.reconnect_for}; give 0 or more seconds.")
        if (self.source_options or self.reconnect_for is not None) and not self.is_stream:
            raise UserError(
                "--source-option and --reconnect-for are for cameras and addresses; leave them out for files and pipes."
            )

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

    @property
    def path(self) -> str:
        """The source, without "file://"."""
        return self.source[len("file://") :] if self.source.lower().startswith("file://") else self.source

    @property
    def state(self) -> Path | None:
        """Where the state is saved as it goes."""
        return self.out[0].with_name(self.out[0].name + ".state") if self.out else None

    def identity(self, model: str) -> dict[str, Any]:
        """What must be the same for a run to be gone on with; JSON-ready. A file may have moved."""
        path = self.path
        if is_address(path):
            named: Any = without_secrets(path)
        elif self.is_file:
            named = [Path(path).name, Path(path).stat().st_size if Path(path).is_file() else 0]
        else:
            named = Path(path).name if os.path.isdir(path) else path
        return {
            "model": model,
            "source": named,
            "fps": self.fps,
            "start": self.start,
            "live": self.live,
            "hold": self.hold,
            "cue": self.cue,
            "prompt": self.prompt,
            "max_text_tokens": self.max_text_tokens,
            "max_new_tokens": self.max_new_tokens,
            "sampling": self.sampling.to_dict(),
            "seed": self.seed,
            "questions": [[question.seconds, question.text] for question in self.questions],
        }


def parse_option(written: str) -> tuple[str, str]:
    """ "rtsp_transport=udp" -> ("rtsp_transport", "udp"). Raises UserError for anything else."""
    name, mark, value = written.partition("=")
    if not mark or not name.strip():
        raise UserError(f'"{written}" is no option of a source; write it as rtsp_transport=udp.')
    return name.strip(), value


def _check_place(path: Path, endings: tuple[str, ...]) -> None:
    if path.suffix.lower() not in endings:
        raise UserError(f"{path} has no known ending; use {', '.join(endings)}.")
    if not path.parent.is_dir():
        raise UserError(f"The folder of {path} does not exist: create it, or write elsewhere.")
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a file to write.")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise UserError(f"{path} cannot be written (Permission denied): write to another folder.")
