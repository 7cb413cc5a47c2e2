"""Pictures and video in; subtitles and captioned video out. Knows nothing of any model."""

from casa.media.drawing import burn_captions, draw_caption
from casa.media.pictures import check_picture, open_picture
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
from casa.media.video import Frame, FrameReader, VideoInfo, probe, read_frames
from casa.media.video_writer import VideoWriter

__all__ = [
    "Caption",
    "Frame",
    "FrameReader",
    "VideoInfo",
    "VideoWriter",
    "burn_captions",
    "captions_from_frames",
    "check_picture",
    "draw_caption",
    "open_picture",
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
