"""Cameras and the screen of this machine, through FFmpeg's devices.

camera:0                Linux and macOS: by number
camera:/dev/video2      Linux: by its file
camera:USB Camera       macOS and Windows: by its name
screen                  the whole screen
"""

import sys

from casa.errors import UserError
from casa.media.backoff import Backoff
from casa.media.decoder import Decoder
from casa.media.pyav import import_av
from casa.media.stream_source import StreamSource


def is_device(spec: str) -> bool:
    return spec.startswith(("camera:", "/dev/video")) or spec in ("camera", "screen") or spec.startswith("screen:")


def open_device(
    spec: str, fps: float = 2.0, *, options: dict[str, str] | None = None, backoff: Backoff | None = None
) -> StreamSource:
    """Frames of a camera or of the screen, live, sampled at `fps`.

    options: FFmpeg's own, such as {"video_size": "1280x720"}. backoff: as for `StreamSource`.
    Raises UserError if there is no such device, it is in use, or this PyAV was built without devices.
    """
    where, format, given = address(spec, sys.platform)
    if spec.startswith("screen"):
        given["framerate"] = str(max(1, round(fps)))
    given |= options or {}
    try:
        import_av().format.ContainerFormat(format)
    except ValueError as error:
        raise UserError(f"This PyAV was built without {format}: install the wheel of av for this system.") from error

    def open_decoder(counts):
        sentence = f"{spec} gives no picture: check that it is plugged in, allowed, and used by nobody else."
        return Decoder(where, spec, sentence, counts, format=format, options=given, live=True)

    return StreamSource(open_decoder, spec, fps, live=True, backoff=backoff)


def address(spec: str, platform: str) -> tuple[str, str, dict[str, str]]:
    """What FFmpeg opens for a device of `platform` (as `sys.platform`): its address, its format, its options."""
    kind, _, which = spec.partition(":")
    if spec.startswith("/dev/video"):
        kind, which = "camera", spec
    camera = kind == "camera"
    if platform.startswith("linux"):
        if camera:
            which = which or "0"
            return (f"/dev/video{which}" if which.isdigit() else which), "v4l2", {}
        return which or ":0.0", "x11grab", {}
    if platform == "darwin":
        # most cameras there refuse FFmpeg's default of 29.97
        return (which or "0" if camera else f"Capture screen {which or 0}"), "avfoundation", {"framerate": "30"}
    if platform == "win32":
        if camera and (not which or which.isdigit()):
            raise UserError("On Windows a camera is called by its name: camera:Integrated Camera")
        return (f"video={which}", "dshow", {}) if camera else ("desktop", "gdigrab", {})
    raise UserError(f"Cameras are not read on {platform}: pipe them in, as ffmpeg ... | casa caption -")
