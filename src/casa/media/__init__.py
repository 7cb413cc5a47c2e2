"""Pictures and video in, from wherever they come; captions out, as they are said. Knows nothing of any model."""

from casa.media.backoff import Backoff
from casa.media.caption_file import CaptionFile, CaptionList
from casa.media.drawing import burn_captions, draw_caption
from casa.media.open_source import open_source
from casa.media.pictures import check_picture, open_picture
from casa.media.recorder import Recorder
from casa.media.source import Counts, Frame, Source
from casa.media.subtitle_track import add_subtitle_track, check_subtitle_track
from casa.media.subtitles import Caption, captions_from_frames, read_captions, tidy, write_captions
from casa.media.video import FrameReader, VideoInfo, probe, read_frames
from casa.media.video_writer import VideoWriter

__all__ = [
    "Backoff",
    "Caption",
    "CaptionFile",
    "CaptionList",
    "Counts",
    "Frame",
    "FrameReader",
    "Recorder",
    "Source",
    "VideoInfo",
    "VideoWriter",
    "add_subtitle_track",
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
