"""What FFmpeg plays is given, whole and at its times: codecs, containers, moving pictures, films that begin late."""

import io
import re
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from casa.errors import UserError
from casa.media import Caption, add_subtitle_track, burn_captions, check_subtitle_track, open_source
from casa.media.decoder import upright
from casa.media.video import probe, read_frames, sniff

RATE, FRAMES = 10, 6
# file name: encoder, how its pixels are stored; then, where it is not the usual, FFmpeg's format, (W, H), frames per
# second, the encoder's options
FILMS = {
    "h264.mp4": ("libx264", "yuv420p"),
    "h264 odd.mkv": ("libx264", "yuv444p", None, (47, 31)),
    "h264 ten bits.mkv": ("libx264", "yuv420p10le"),
    "h264 grey.mkv": ("libx264", "gray"),
    "h264 bframes.mp4": ("libx264", "yuv420p", None, (48, 32), 10, {"bf": "2", "b-adapt": "0"}),
    "h264 bframes.mkv": ("libx264", "yuv420p", None, (48, 32), 10, {"bf": "2", "b-adapt": "0"}),
    "h264 bframes.ts": ("libx264", "yuv420p", "mpegts", (48, 32), 10, {"bf": "2", "b-adapt": "0"}),
    "h264.flv": ("libx264", "yuv420p"),
    "h264.mov": ("libx264", "yuv420p"),
    "bare.h264": ("libx264", "yuv420p", "h264", (48, 32), 25),
    "fragmented.mp4": ("libx264", "yuv420p", None, (48, 32), 10, {"movflags": "frag_every_frame+empty_moov"}),
    "hevc.mp4": (
        "libx265",
        "yuv420p",
        None,
        (64, 64),
        10,
        {"x265-params": "pools=none:frame-threads=1:log-level=none"},
    ),
    "vp8.webm": ("libvpx", "yuv420p"),
    "vp9.webm": ("libvpx-vp9", "yuv420p"),
    "vp9 alpha.webm": ("libvpx-vp9", "yuva420p"),
    "vp9.ivf": ("libvpx-vp9", "yuv420p"),
    "av1.mp4": ("libsvtav1", "yuv420p", None, (64, 64), 10, {"preset": "12"}),
    "mpeg1.mkv": ("mpeg1video", "yuv420p", None, (48, 32), 25),
    "mpeg2.mpg": ("mpeg2video", "yuv420p"),
    "mpeg2.ts": ("mpeg2video", "yuv420p"),
    "bare.m2v": ("mpeg2video", "yuv420p", "mpeg2video"),
    "mpeg4.avi": ("mpeg4", "yuv420p"),
    "mjpeg.avi": ("mjpeg", "yuvj420p"),
    "mjpeg.mov": ("mjpeg", "yuvj420p"),
    "png.avi": ("png", "rgb24"),
    "png alpha.mov": ("png", "rgba"),
    "png.nut": ("png", "rgb24"),
    "ffv1.mkv": ("ffv1", "yuv420p"),
    "ffv1 odd.mkv": ("ffv1", "yuv444p", None, (47, 31)),
    "ffv1 16 bits grey.mkv": ("ffv1", "gray16le"),
    "ffv1 alpha.mkv": ("ffv1", "bgra"),
    "prores.mov": ("prores_ks", "yuv422p10le"),
    "prores alpha.mov": ("prores_ks", "yuva444p10le"),
    "huffyuv.avi": ("huffyuv", "yuv422p"),
    "raw.avi": ("rawvideo", "yuv420p"),
    "raw.nut": ("rawvideo", "gray"),
    "raw.y4m": ("wrapped_avframe", "yuv420p", "yuv4mpegpipe"),
    "wmv2.wmv": ("wmv2", "yuv420p"),
    "h263.3gp": ("h263", "yuv420p", None, (176, 144)),
    "qtrle.mov": ("qtrle", "rgb24"),
    "cinepak.avi": ("cinepak", "rgb24"),
    "jpeg2000.mkv": ("jpeg2000", "rgb24"),
    "sorenson.flv": ("flv", "yuv420p"),
    "sorenson.swf": ("flv", "yuv420p"),
    "moving.gif": ("gif", "rgb8"),
    "moving.apng": ("apng", "rgba"),
    "moving.png": ("apng", "rgba", "apng"),
    "moving.webp": ("libwebp_anim", "yuv420p", "webp"),
    "moving.avif": ("libsvtav1", "yuv420p", "avif", (64, 64), 10, {"preset": "12"}),
    "in a row.mjpeg": ("mjpeg", "yuvj420p", "mjpeg", (48, 32), 25),
    "in a row.mjpg": ("mjpeg", "yuvj420p", "mjpeg", (48, 32), 25),
    "in a row.jpg": ("mjpeg", "yuvj420p", "mjpeg", (48, 32), 25),
    "in a row.png": ("png", "rgb24", "image2pipe", (48, 32), 25),
    "in a row.bmp": ("bmp", "bgr24", "image2pipe", (48, 32), 25),
    "in a row.webp": ("libwebp", "yuv420p", "image2pipe", (48, 32), 25),
    "parts.mpjpeg": ("mjpeg", "yuvj420p", "mpjpeg", (48, 32), 25),
}
# what can be read from its index only, which stands at the end
NOT_PIPED = ("h264.mp4", "bframes.mp4", "hevc.mp4", "av1.mp4", ".mov", ".3gp")


class Forwards:
    """What a pipe gives: bytes, once."""

    def __init__(self, data):
        self.read = io.BytesIO(data).read


def film(path, codec, pixels, format=None, size=(48, 32), rate=RATE, options=None, ticks=range(FRAMES)):
    """Grey frames, each lighter, at `ticks` / `rate` seconds."""
    options = options or {}
    container = {"movflags": options["movflags"]} if "movflags" in options else {}
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        pytest.skip(f"this PyAV does not write {codec}")
    with av.open(str(path), "w", format=format, options=container) as made:
        stream = made.add_stream(codec, rate=rate, options={k: v for k, v in options.items() if k not in container})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        for k, tick in enumerate(ticks):
            made.mux(stream.encode(shade(k, size, pixels, tick, rate)))
        made.mux(stream.encode())
    return path


def shade(k, size, pixels, tick, rate):
    grey = np.full((size[1], size[0], 3), 40 + 30 * k, np.uint8)
    frame = av.VideoFrame.from_ndarray(grey, format="rgb24").reformat(format=pixels)
    frame.pts, frame.time_base = tick, Fraction(1, rate)
    return frame


def seen(frames):
    """(which frame it is, its second) of each."""
    return [(round((float(frame.picture.mean()) - 40) / 30), round(frame.time, 3)) for frame in frames]


def near(wanted):
    return [(number, pytest.approx(seconds, abs=2e-3)) for number, seconds in wanted]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("films"), {}

    def get(name):
        if name not in made:
            made[name] = film(folder / name, *FILMS[name])
        return made[name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("name", FILMS)
def test_every_frame_at_its_time(films, name):
    path = films(name)
    rate = (*FILMS[name], None, None, None)[4] or RATE
    size = (*FILMS[name], None, None)[3] or (48, 32)
    size = (192, 144) if name == "h263.3gp" else size  # its pixels are wide
    wanted = [(k, k / rate) for k in range(FRAMES)]
    frames = list(read_frames(path, fps=None))
    assert seen(frames) == near(wanted)
    assert {frame.picture.shape for frame in frames} == {(size[1], size[0], 3)}
    info = probe(path)
    assert (info.width, info.height) == size
    with open_source(path, fps=rate / 2) as source:
        assert seen(source) == near(wanted[::2])
        # FFmpeg's own parts end without their last mark
        assert source.counts.skipped == (name == "parts.mpjpeg")
    with open_source(path, fps=rate, start=3 / rate) as source:
        assert seen(source) == near(wanted[3:])
    with open_source(path, fps=rate, after=2 / rate) as source:
        assert seen(source) == near(wanted[3:])


@pytest.mark.parametrize("name", [name for name in FILMS if not name.endswith(NOT_PIPED)])
def test_every_frame_through_a_pipe(films, name):
    rate = (*FILMS[name], None, None, None)[4] or RATE
    with open_source(Forwards(films(name).read_bytes()), fps=rate) as source:
        assert seen(source) == near([(k, k / rate) for k in range(FRAMES)])


# what the containers of a text track hold, of the codecs in common use
HELD = {
    "h264.mp4": ".mp4 .mov .mkv",
    "h264.flv": ".mp4 .mov .mkv",
    "h264 bframes.mkv": ".mp4 .mov .mkv",
    "h264 bframes.ts": ".mp4 .mov .mkv",
    "hevc.mp4": ".mp4 .mov .mkv",
    "av1.mp4": ".mp4 .mkv",
    "vp8.webm": ".mkv",
    "vp9.webm": ".mp4 .mkv",
    "mpeg2.mpg": ".mp4 .mov .mkv",
    "mpeg4.avi": ".mp4 .mov .mkv",
    "mjpeg.avi": ".mp4 .mov .mkv",
    "prores.mov": ".mov .mkv",
    "png.avi": ".mp4 .mov",
    "ffv1.mkv": ".mp4 .mkv",
    "wmv2.wmv": "",
}


def sentence(function, *given):
    """What is said to the user; "" if it can be done."""
    try:
        function(*given)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILMS if name != "parts.mpjpeg"])
def test_a_text_track_beside_every_codec(films, tmp_path, name):
    """Either the film with its text, on one clock; or a sentence at once, which names the endings that do."""
    path, held = films(name), []
    wanted = seen(read_frames(path, fps=None))
    for suffix in (".mp4", ".mov", ".mkv"):
        out = tmp_path / f"a{suffix}"
        refused = sentence(check_subtitle_track, path, out)
        if refused:
            assert "\n" not in refused
            for named in re.findall(r"\.(?:mp4|mov|mkv)", refused.partition("as it is")[2]):
                check_subtitle_track(path, tmp_path / f"b{named}")
            assert sentence(add_subtitle_track, path, [], out) == refused
            assert not out.exists()
            continue
        held.append(suffix)
        add_subtitle_track(path, [Caption(0.0, 0.2, "one"), Caption(0.2, 0.5, "two")], out)
        assert seen(read_frames(out, fps=None)) == near(wanted)
        with av.open(str(out)) as made:
            # what players begin with is what casa counts from
            assert made.start_time in (0, None)
            said = [
                (p.pts * p.time_base, bytes(p)[0 if suffix == ".mkv" else 2 :])
                for p in made.demux(subtitles=0)
                if p.size
            ]
        assert [(float(at), text) for at, text in said if text] == [
            (0.0, b"one"),
            (pytest.approx(0.2, abs=1e-3), b"two"),
        ]
    if name in HELD:
        assert " ".join(held) == HELD[name]


def test_a_broadcast_is_brought_to_zero(tmp_path):
    """Its clock says ten hours; and it was joined of two, so that it says so again in the middle."""
    begin = 36_000 * RATE
    for name in ("one", "two"):
        with av.open(str(tmp_path / name), "w", format="mpegts", options={"mpegts_copyts": "1"}) as made:
            stream = made.add_stream("mpeg2video", rate=RATE, options={"g": "1", "bf": "0"})
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for k in range(20):
                made.mux(stream.encode(shade(k % FRAMES, (48, 32), "yuv420p", begin + k, RATE)))
            made.mux(stream.encode())
    path = tmp_path / "a.ts"
    path.write_bytes((tmp_path / "one").read_bytes() + (tmp_path / "two").read_bytes())
    wanted = [(k % 20 % FRAMES, k / RATE) for k in range(40)]
    with read_frames(path, fps=None) as frames:
        assert seen(frames) == near(wanted)
        assert frames.counts.skipped <= 1, "the seam"
    for suffix in ("mp4", "mkv"):
        add_subtitle_track(path, [Caption(0.0, 1.0, "one"), Caption(3.0, 4.0, "two")], tmp_path / f"a.{suffix}")
        assert seen(read_frames(tmp_path / f"a.{suffix}", fps=None)) == near(wanted)
        with av.open(str(tmp_path / f"a.{suffix}")) as made:
            assert made.start_time == 0
            said = [float(p.pts * p.time_base) for p in made.demux(subtitles=0) if len(bytes(p)) > 2]
        assert said == [0.0, 3.0]


def test_pages_and_animations_of_pillow(tmp_path):
    pictures = [Image.new("RGB", (48, 32), (40 + 30 * k,) * 3) for k in range(4)]
    more = {"save_all": True, "append_images": pictures[1:]}
    pictures[0].save(tmp_path / "a.tif", **more)
    for suffix in ("webp", "png", "gif", "avif"):
        pictures[0].save(tmp_path / f"a.{suffix}", duration=[100, 200, 300, 100], **more)
        assert seen(read_frames(tmp_path / f"a.{suffix}", fps=None)) == near([(0, 0), (1, 0.1), (2, 0.3), (3, 0.6)])
        assert suffix == "png" or probe(tmp_path / f"a.{suffix}").duration == pytest.approx(0.7, abs=0.01)
    assert seen(read_frames(tmp_path / "a.tif")) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    with open_source(Forwards((tmp_path / "a.tif").read_bytes())) as source:
        assert seen(source) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    # the thumbnail of a page is none
    pictures[0].save(tmp_path / "b.tif", save_all=True, append_images=pictures[1:2], tiffinfo={254: 1})
    assert seen(read_frames(tmp_path / "b.tif")) == [(0, 0)]


def test_what_is_one_picture(tmp_path):
    """With another behind it that is no next frame: the other eye, a preview, a film that a phone has hidden there."""
    eyes = [Image.new("RGB", (48, 32), (40 + 30 * k,) * 3) for k in range(2)]
    eyes[0].save(tmp_path / "eyes.jpg", format="MPO", save_all=True, append_images=eyes[1:])
    eyes[0].save(tmp_path / "one.jpg", progressive=True)
    one = (tmp_path / "one.jpg").read_bytes()
    (tmp_path / "moving.jpg").write_bytes(one + b"\0\0\0\x18ftypmp42" + bytes(100))
    eyes[1].resize((24, 16)).save(tmp_path / "small.jpg")
    (tmp_path / "preview.jpg").write_bytes(one + (tmp_path / "small.jpg").read_bytes())
    for name in ("eyes.jpg", "one.jpg", "moving.jpg", "preview.jpg"):
        assert seen(read_frames(tmp_path / name)) == [(0, 0)], name
        assert probe(tmp_path / name).frames == 1


def test_nothing_is_looked_for_behind_the_zeros_of_a_download_that_stopped(tmp_path):
    path = tmp_path / "stopped.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(12 * 5) + b"\0\0\0\0acTL" + bytes(100))
    assert sniff(path).frames == "one"
    with pytest.raises(UserError, match="cannot be read as a picture"):
        probe(path)


CORNERS = np.zeros((32, 48, 3), np.uint8)
CORNERS[:16, :24], CORNERS[:16, 24:], CORNERS[16:, :24] = (220, 30, 30), (30, 220, 30), (30, 30, 220)


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("suffix", ["mjpeg", "avi", "mov", "pipe"])
def test_frames_with_exif_stand_upright(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x010F] = "Acme"
    if orientation is not None:
        exif[0x0112] = orientation
    held = io.BytesIO()
    Image.fromarray(CORNERS).save(held, "JPEG", exif=exif, quality=95)
    jpeg = held.getvalue()
    if suffix in ("mjpeg", "pipe"):
        given = tmp_path / "a.mjpeg"
        given.write_bytes(4 * jpeg)
        given = io.BytesIO(4 * jpeg) if suffix == "pipe" else given
    else:
        given = tmp_path / f"a.{suffix}"
        with av.open(str(given), "w") as made:
            stream = made.add_stream("mjpeg", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
            for k in range(4):
                packet = av.Packet(jpeg)
                packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, RATE), k, k
                made.mux(packet)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg))).convert("RGB"))
    with open_source(given, fps=100) as source:
        frames = list(source)
    assert len(frames) == 4
    for frame in frames:
        assert frame.picture.shape == upright.shape
        assert np.abs(frame.picture.astype(int) - upright).mean() < 4


@pytest.mark.parametrize("space", [3, 8, 10, 14, 29])
def test_colours_that_ffmpeg_does_not_convert_are_shown_all_the_same(space):
    frame = shade(2, (48, 32), "yuv420p", 0, 1)
    frame.colorspace, frame.color_range = space, 7
    picture, _ = upright(frame, 1.0)
    assert abs(float(picture.mean()) - 100) < 3


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_variable_frame_rate(tmp_path, suffix):
    ticks = [0, 1, 4, 5, 9]
    path = film(tmp_path / f"a.{suffix}", "mpeg4", "yuv420p", ticks=ticks)
    assert seen(read_frames(path, fps=None)) == near([(k, tick / RATE) for k, tick in enumerate(ticks)])


def test_a_film_that_knows_no_length(tmp_path, clips):
    """Matroska written to a pipe: no length, no index."""
    held = io.BytesIO()

    class Forwards:
        write = staticmethod(held.write)

    with av.open(Forwards(), "w", format="matroska") as made:
        stream = made.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for k in range(FRAMES):
            made.mux(stream.encode(shade(k, (48, 32), "yuv420p", k, RATE)))
        made.mux(stream.encode())
    (tmp_path / "a.mkv").write_bytes(held.getvalue())
    assert seen(read_frames(tmp_path / "a.mkv", fps=None)) == near([(k, k / RATE) for k in range(FRAMES)])
    assert seen(read_frames(tmp_path / "a.mkv", fps=RATE, start=0.2)) == near([(k, k / RATE) for k in range(2, FRAMES)])


def with_sound(path, late, begin=0.0):
    """A film with sound; its picture comes `late` seconds after the sound (or before it), and both after `begin`."""
    with av.open(str(path), "w", format="mpegts" if path.suffix == ".ts" else None) as made:
        video, sound = made.add_stream("mpeg4", rate=RATE), made.add_stream("mp2", rate=48_000)
        video.width, video.height, video.pix_fmt, sound.layout = 48, 32, "yuv420p", "mono"
        first, heard = begin + max(0.0, late), begin + max(0.0, -late)
        packets = []
        for k in range(FRAMES):
            packets += video.encode(shade(k, (48, 32), "yuv420p", round(first * RATE) + k, RATE))
        packets += video.encode()
        wave = av.AudioFrame.from_ndarray(np.zeros((1, 96_000), np.int16), format="s16", layout="mono")
        wave.rate, wave.pts, wave.time_base = 48_000, round(heard * 48_000), Fraction(1, 48_000)
        packets += [*sound.encode(wave), *sound.encode()]
        for packet in sorted(packets, key=lambda one: one.dts * one.time_base):
            made.mux(packet)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
@pytest.mark.parametrize(("late", "begin"), [(1.0, 0.0), (-1.0, 0.0), (1.0, 5.0), (0.7, 0.0)])
def test_a_picture_that_comes_before_or_after_the_sound(tmp_path, suffix, late, begin):
    """Its times are the film's own, however it is looked at, and so are those of what is made of it."""
    path = with_sound(tmp_path / f"a.{suffix}", late, begin)
    first = max(0.0, late)
    every = seen(read_frames(path, fps=None))
    # MP2 begins a little before its first sound
    assert every == [(k, pytest.approx(first + k / RATE, abs=0.03)) for k in range(FRAMES)]
    begun = every[0][1]
    later = [second for second in (0.5, 1.0, 1.5) if begun < second < every[-1][1] + 0.1]
    sampled = [(0, begun), *((int((second - begun) * RATE + 0.02), second) for second in later)]
    assert seen(read_frames(path, fps=2)) == near(sampled)
    assert seen(read_frames(path, fps=2, after=begun)) == near(sampled[1:])
    if suffix != "mp4":
        with open_source(io.BytesIO(path.read_bytes()), fps=2) as piped:
            assert seen(piped) == near(sampled)
    burn_captions(path, [], tmp_path / "burnt.mp4")
    burnt = seen(read_frames(tmp_path / "burnt.mp4", fps=None))
    assert burnt[-FRAMES:] == near(every)
    assert burnt[0] == (0, 0.0)


def test_a_stream_that_shows_up_late_hides_nothing(tmp_path):
    """A programme stream says of its streams only that they are there: when sound begins, it is another."""
    packets = []
    with av.open(str(tmp_path / "a.mpg"), "w") as made:
        video, sound = made.add_stream("mpeg2video", rate=25), made.add_stream("mp2", rate=48_000)
        video.width, video.height, video.pix_fmt, sound.layout = 48, 32, "yuv420p", "mono"
        for k in range(200):
            packets += video.encode(shade(k % FRAMES, (48, 32), "yuv420p", k, 25))
        packets += video.encode()
        wave = av.AudioFrame.from_ndarray(np.zeros((1, 48_000), np.int16), format="s16", layout="mono")
        wave.rate, wave.pts, wave.time_base = 48_000, 7 * 48_000, Fraction(1, 48_000)
        packets += [*sound.encode(wave), *sound.encode()]
        for packet in sorted(packets, key=lambda one: one.dts * one.time_base):
            made.mux(packet)
    for live in (True, False):
        with open_source(io.BytesIO((tmp_path / "a.mpg").read_bytes()), fps=1000, live=live) as source:
            assert len(list(source)) == 200


@pytest.mark.parametrize("movflags", ["faststart", "frag_every_frame+empty_moov"])
def test_a_film_that_is_cut_off_is_read_as_far_as_it_goes(tmp_path, movflags):
    """And what is missing is counted, where the film says how much it was."""
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (10, 48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w", options={"movflags": movflags}) as made:
        stream = made.add_stream("mpeg4", rate=RATE, options={"g": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture in noise:
            made.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        made.mux(stream.encode())
    whole = path.read_bytes()
    with read_frames(path, fps=None) as reader:
        assert len(list(reader)) == 10
        assert reader.counts.skipped == 0
    path.write_bytes(whole[: len(whole) // 2])
    with read_frames(path, fps=None) as reader:
        frames = list(reader)
    assert 2 <= len(frames) <= 6
    assert [round(frame.time * RATE) for frame in frames] == list(range(len(frames)))
    assert reader.counts.skipped == 10 - len(frames) or (movflags != "faststart" and reader.counts.skipped > 0)
    path.write_bytes(whole[: whole.index(b"mdat") + 8])
    with pytest.raises(UserError, match="cut off"):
        read_frames(path)
