"""What a shape is given besides the row: where its files are, how its videos are looked at, what it is called."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from casa.data.frames import video_frames
from casa.data.pictures import Files
from casa.data.record import Origin, Picture
from casa.data.settings import SourceSettings

# (video, fps, start and end in seconds, longest side in px, frames at most, whether a longer one is thinned)
FramesOf = Callable[[Path, float, float, float | None, int, int, bool], list[Picture]]


@dataclass(frozen=True)
class Context:
    """origin: of the row. frames_of: reads a video; tests put another in its place."""

    origin: Origin
    files: Files
    settings: SourceSettings
    frames_of: FramesOf = video_frames

    def frames(self, path: Path, start: float = 0.0, end: float | None = None, *, thin: bool) -> list[Picture]:
        """A video's frames as the settings say. thin: look less often at a long one, rather than refuse it."""
        chosen = self.settings
        return self.frames_of(path, chosen.fps, start, end, chosen.frame_side, chosen.most_frames, thin)
