"""Pictures as rows name them, and paths that must not lead out of the root."""

import base64
from pathlib import Path

import pytest
from PIL import Image

from casa.data import BadRecord, Message, Origin, Picture, Record, SourceSettings, Text, open_pictures
from casa.data.pictures import RowContext


def row(root, members=(), **settings) -> RowContext:
    return RowContext(Origin("rows.jsonl", 1), SourceSettings("rows.jsonl", **settings), root, dict(members))


def record(*sources) -> Record:
    parts = tuple(Picture(source) for source in sources)
    return Record((Message("user", parts), Message("assistant", (Text("A cat."),))), Origin("rows.jsonl", 1))


def test_pictures_are_opened_in_order(root):
    data = (root / "b.png").read_bytes()
    pictures = open_pictures(record(root / "a.png", data))
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(255, 0, 0), (0, 128, 0)]


def test_a_truncated_jpeg_is_refused_when_it_is_opened(root):
    Image.effect_noise((300, 300), 80).save(root / "n.jpg")
    whole = (root / "n.jpg").read_bytes()
    (root / "n.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadRecord, match=r"n\.jpg is damaged or cut off"):
        open_pictures(record(row(root).picture("n.jpg").source))
    with pytest.raises(BadRecord, match="Picture 2 is damaged or cut off") as refused:
        open_pictures(record(root / "a.png", whole[: len(whole) // 2]))
    assert refused.value.reason == "unreadable-picture"


@pytest.mark.parametrize("content", [b"", b"GIF", b"no picture at all"])
def test_what_is_no_picture_is_refused(root, content):
    (root / "x.png").write_bytes(content)
    with pytest.raises(BadRecord):
        open_pictures(record(root / "x.png"))


@pytest.mark.parametrize("value", ["a.png", "./a.png", "sub/../a.png", "file://{root}/a.png", "{root}/a.png"])
def test_paths_within_the_root(root, value):
    (root / "sub").mkdir()
    found = row(root).picture(value.format(root=root))
    assert Path(found.source).samefile(root / "a.png")


@pytest.mark.parametrize(
    "value", ["../secret.png", "sub/../../secret.png", "{outside}", "link.png", "linked/secret.png"]
)
def test_paths_out_of_the_root_are_refused_unless_allowed(root, value):
    inside = root / "inside"
    (inside / "sub").mkdir(parents=True)
    (root / "secret.png").write_bytes((root / "a.png").read_bytes())
    (inside / "link.png").symlink_to(root / "secret.png")
    (inside / "linked").symlink_to(root)
    value = value.format(outside=root / "secret.png")
    with pytest.raises(BadRecord, match="set root to a folder that holds it") as refused:
        row(inside).picture(value)
    assert refused.value.reason == "outside"
    assert Path(row(inside, outside=True).picture(value).source).samefile(root / "secret.png")


def test_nothing_is_told_about_files_outside(root):
    inside = root / "inside"
    inside.mkdir()
    sentences = set()
    for there in ("../a.png", "../z.png"):
        with pytest.raises(BadRecord) as refused:
            row(inside).picture(there)
        sentences.add(str(refused.value).replace(there, "x"))
    assert len(sentences) == 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("z.png", "missing-picture"),
        (".", "missing-picture"),
        ("a.png\0.jpg", "wrong-type"),
        ("x" * 5000, "missing-picture"),
        ("http://example.org/a.png", "missing-picture"),
        ("s3://bucket/a.png", "missing-picture"),
        ("data:image/png", "unreadable-picture"),
        ("data:image/png;base64,???", "unreadable-picture"),
        ("data:image/png;base64,", "unreadable-picture"),
        ({"bytes": b""}, "unreadable-picture"),
        ({}, "missing-picture"),
        (None, "missing-picture"),
        (7, "wrong-type"),
        (["a.png"], "wrong-type"),
        ("half \ud83d.png", "missing-picture"),
    ],
)
def test_what_names_no_picture_is_refused(root, value, reason):
    with pytest.raises(BadRecord) as refused:
        row(root).picture(value)
    assert refused.value.reason == reason


def test_bytes_in_every_wrapping(root):
    data = (root / "a.png").read_bytes()
    code = base64.b64encode(data).decode()
    for value in (
        data,
        bytearray(data),
        {"bytes": data, "path": "elsewhere.png"},
        "data:image/png;base64," + code,
        "DATA:image/png;base64," + code[:10] + "\n" + code[10:],
    ):
        assert row(root).picture(value).source == data
    assert row(root, members={"z.png": data}).picture("z.png").source == data
