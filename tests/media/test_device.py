"""Cameras and screens: how each system calls them, and a made-up one read through FFmpeg's test picture."""

import pytest

from casa.errors import UserError
from casa.media import device
from casa.media.device import address, is_device, open_device
from casa.media.open_source import open_source


@pytest.mark.parametrize(
    ("spec", "platform", "where", "format"),
    [
        ("camera:0", "linux", "/dev/video0", "v4l2"),
        ("camera", "linux", "/dev/video0", "v4l2"),
        ("camera:/dev/video2", "linux", "/dev/video2", "v4l2"),
        ("/dev/video1", "linux", "/dev/video1", "v4l2"),
        ("screen", "linux", ":0.0", "x11grab"),
        ("screen::1.0", "linux", ":1.0", "x11grab"),
        ("camera:1", "darwin", "1", "avfoundation"),
        ("camera:FaceTime HD", "darwin", "FaceTime HD", "avfoundation"),
        ("screen", "darwin", "Capture screen 0", "avfoundation"),
        ("camera:USB Camera", "win32", "video=USB Camera", "dshow"),
        ("screen", "win32", "desktop", "gdigrab"),
    ],
)
def test_addresses(spec, platform, where, format):
    assert is_device(spec)
    assert address(spec, platform)[:2] == (where, format)


def test_what_has_no_camera():
    with pytest.raises(UserError, match="called by its name"):
        address("camera:0", "win32")
    with pytest.raises(UserError, match="not read on emscripten"):
        address("camera:0", "emscripten")
    assert not is_device("camera.mp4")
    assert not is_device("screens/a.png")


def test_no_such_camera():
    with pytest.raises(UserError, match="camera:987 gives no picture: check that it is plugged in"):
        open_device("camera:987")


def test_a_pyav_without_devices(monkeypatch):
    monkeypatch.setattr(device, "address", lambda spec, platform: ("0", "no-such-devices", {}))
    with pytest.raises(UserError, match="built without no-such-devices: install the wheel"):
        open_device("camera:0")


def test_a_camera_is_a_live_source(monkeypatch):
    made_up = ("testsrc=size=64x48:rate=10", "lavfi", {})
    monkeypatch.setattr(device, "address", lambda spec, platform: made_up)
    with open_source("camera:0", fps=5) as source:
        assert source.is_live
        assert source.describe == "camera:0: 64 x 48, wrapped_avframe, live"
        frames = [next(source) for _ in range(4)]
    assert [f.seconds for f in frames] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert frames[0].picture.shape == (48, 64, 3)
    assert frames[0].picture.std() > 20
    assert list(source) == []
