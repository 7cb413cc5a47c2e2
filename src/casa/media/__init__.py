"""Pictures and video in, from wherever they come; captions out, as they are said. Knows nothing of any model."""

from casa.media.backoff import Backoff
from casa.media.caption_writers import CallbackWriter, CaptionWriter, FileWriter, ManyWriters, open_writer
from casa.media.drawing import burn_captions, draw_caption
from casa.media.open_source import open_source
from casa.media.pictures import check_picture, open_picture
from casa.media.recorder import Recorder
from casa.media.source import Counts, Frame, Source
from casa.media.subtitle_track import add_subtitle_track, check_subtitle_track
from casa.media.subtitles import (
    Caption,
    captions_from_frames,
    read_jsonl,
    read_srt,
    read_vtt,
    tidy,
    write_jsonl,
    write_srt,
    write_vtt,
)
from casa.media.video import FrameReader, VideoInfo, probe, read_frames
from casa.media.video_writer import VideoWriter

__all__ = [
    "Backoff",
    "CallbackWriter",
    "Caption",
    "CaptionWriter",
    "Counts",
    "FileWriter",
    "Frame",
    "FrameReader",
    "ManyWriters",
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
    "open_writer",
    "probe",
    "read_frames",
    "read_jsonl",
    "read_srt",
    "read_vtt",
    "tidy",
    "write_jsonl",
    "write_srt",
    "write_vtt",
]
