"""Pictures and video in, from wherever they come; captions out, as they are said. Knows nothing of any model."""

from casa.media.drawing import draw_caption
from casa.media.pictures import as_picture, check_picture, open_picture
from casa.media.source import Frame, SourceCounts, VideoSource
from casa.media.sources import open_source
from casa.media.streams import Backoff
from casa.media.subtitle_track import add_subtitle_track, check_subtitle_track
from casa.media.subtitles import (
    Caption,
    CaptionFile,
    CaptionList,
    captions_from_frames,
    read_captions,
    tidy,
    write_captions,
)
from casa.media.video import FileSource, VideoInfo, probe, read_frames
from casa.media.video_writer import Recorder, VideoWriter, burn_captions

__all__ = [
    "Backoff",
    "Caption",
    "CaptionFile",
    "CaptionList",
    "FileSource",
    "Frame",
    "Recorder",
    "SourceCounts",
    "VideoInfo",
    "VideoSource",
    "VideoWriter",
    "add_subtitle_track",
    "as_picture",
    "burn_captions",
    "captions_from_frames",
    "check_picture",
    "check_subtitle_track",
    "draw_caption",
    "open_picture",
    "open_source",
    "probe",
    "read_captions",
    "read_frames",
    "tidy",
    "write_captions",
]
