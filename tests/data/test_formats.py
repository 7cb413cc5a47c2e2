"""Files of rows: every format gives what was written, from any row on, and names what it cannot read."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from casa.data import BadRecord, formats
from casa.data.files import COMPRESSIBLE, COMPRESSIONS, ENDINGS
from casa.data.formats import READERS, START, file_parts, read_rows

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ROWS = st.lists(st.fixed_dictionaries({"image": TEXT, "caption": TEXT}), max_size=8)


def everything(row: int) -> bool:
    return True


def read(path: Path, start=START, mine=everything) -> list[Any]:
    return [row for part in file_parts(path) for row in read_rows(part, start, mine)]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    kind = path.suffix
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif kind == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, quoting=csv.QUOTE_ALL)
            table.writerows([["image", "caption"], *([row["image"], row["caption"]] for row in rows)])
    elif kind in (".parquet", ".arrow"):
        names = {name: pa.array([row[name] for row in rows], pa.string()) for name in ("image", "caption")}
        if kind == ".parquet":
            pq.write_table(pa.table(names), path, row_group_size=3)
        else:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.table(names).schema) as stream:
                stream.write_table(pa.table(names), max_chunksize=3)
    elif kind == ".tar":
        with tarfile.open(path, "w") as tar:
            for number, row in enumerate(rows):
                add(tar, f"{number:04}.json", json.dumps(row).encode())
    return path


def packed(path: Path, compression: str) -> Path:
    """The file compressed, in the place of the plain one."""
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}
    found = path.with_name(path.name + compression)
    found.write_bytes(compress[compression](path.read_bytes()))
    path.unlink()
    return found


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".arrow", ".tar"])
@settings(max_examples=25, deadline=None)
@given(rows=ROWS)
def test_what_was_written_is_read_from_any_row_on(tmp_path_factory, kind, rows):
    path = write(tmp_path_factory.mktemp("rows") / f"rows{kind}", rows)
    found = read(path)
    assert [row.value for row in found] == rows
    lines = [row.origin.line for row in found]
    assert lines == sorted(lines)
    for part in file_parts(path):
        whole = list(read_rows(part, START, everything))
        for number, row in enumerate(whole):
            again = list(read_rows(part, row.after, everything))
            assert again == whole[number + 1 :]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".arrow", ".tar"])
def test_rows_of_other_readers_are_passed_over(tmp_path, kind):
    rows = [{"image": f"{k}.png", "caption": "x"} for k in range(3)]
    path = write(tmp_path / f"rows{kind}", rows)
    parts = [read(path, mine=lambda row, k=k: row % 2 == k) for k in range(2)]
    assert [[row.value for row in part] for part in parts] == [rows[::2], rows[1::2]]
    assert [row.origin.line for row in sorted([*parts[0], *parts[1]], key=lambda row: row.origin.line)] == [
        r.origin.line for r in read(path)
    ]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", sorted({*COMPRESSIBLE} - {".ndjson", ".tsv"}))
def test_a_compressed_file_is_read_as_what_it_holds(tmp_path, kind, compression):
    rows = [{"image": f"{k}.png", "caption": "x\n" * k} for k in range(7)]
    plain = write(tmp_path / f"rows{kind}", rows)
    wanted = read(plain)
    path = packed(plain, compression)
    found = read(path)
    assert [row.value for row in found] == rows
    assert [(row.origin.line, row.origin.entry) for row in found] == [(r.origin.line, r.origin.entry) for r in wanted]
    for number, row in enumerate(found):
        assert read(path, row.after) == found[number + 1 :]
        assert [again.value for again in read(path, row.after)] == rows[rows.index(row.value) + 1 :]
    assert [row.value for row in read(path, mine=lambda row: row % 2 == 1)] == rows[1::2]


def test_a_compressed_tar_is_never_gone_back_in(tmp_path, monkeypatch):
    """Each step back would mean to decompress it once more from its beginning."""
    rows = [{"image": "x" * 40_000, "caption": str(k)} for k in range(20)]
    path = packed(write(tmp_path / "rows.tar", rows), ".gz")
    back = []
    rewind = gzip._GzipReader._rewind
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda self: (back.append(1), rewind(self)))
    assert [row.value for row in read(path, mine=lambda row: row % 3 == 0)] == rows[::3]
    assert not back


def test_entries_of_one_line_have_origins_of_their_own(tmp_path):
    """A list on one line: the line alone would name all of them alike."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"a": k} for k in range(20)]))
    found = read(path)
    assert {(row.origin.line, row.origin.entry) for row in found} == {(1, f"row {k}") for k in range(1, 21)}
    path.write_text("".join(json.dumps({"a": k}) for k in range(3)))
    assert [(row.origin.line, row.origin.entry) for row in read(path)] == [(1, "row 1"), (1, "row 2"), (1, "row 3")]


def test_every_ending_has_a_reader():
    assert set(READERS) == set(ENDINGS)


@pytest.mark.parametrize("kind", READERS)
def test_an_empty_file_has_no_rows_or_says_so(tmp_path, kind):
    path = tmp_path / f"rows{kind}"
    path.write_bytes(b"")
    found = read(path)
    if kind in (".tar", ".parquet", ".arrow"):
        assert [row.value.reason for row in found] == ["unreadable-file"]
    else:
        assert found == []


def test_json_lines_with_bom_crlf_blanks_emoji_and_a_cut_off_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"a": 1}\r\n\r\n' + '{"a": "🚀 שלום \u2028"}\r\n'.encode() + b'nonsense\n{"a": [1, 2'
    )
    found = read(path)
    assert [row.origin.line for row in found] == [1, 3, 4, 5]
    assert [row.value for row in found[:2]] == [{"a": 1}, {"a": "🚀 שלום \u2028"}]
    assert [row.value.reason for row in found[2:]] == ["not-json", "not-json"]
    assert "the file ends here" not in str(found[2].value)
    assert "the file ends here" in str(found[3].value)
    path.write_bytes(b'\xef\xbb\xbf\r\n{"a": 1}')
    assert [(row.origin.line, row.value) for row in read(path)] == [(2, {"a": 1})]


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"{'a': 1}", b"\0"])
def test_a_line_that_is_no_json_is_one_bad_row(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line + b'\n{"a": 1}\n')
    first, second = read(path)
    assert first.value.reason == "not-json"
    assert second.value == {"a": 1}


def test_a_line_of_20_mb_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": "x" * 20_000_000}) + '\n{"a": 1}\n')
    assert [len(str(row.value["a"])) for row in read(path)] == [20_000_000, 1]


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_ROW_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "' + "x" * 250 + '"}\n{"a": 1}\n' + "y" * 100 + "\n" + "z" * 99 + "\n")
    found = read(path)
    assert [row.value.reason if isinstance(row.value, BadRecord) else row.value for row in found] == [
        "too-long",
        {"a": 1},
        "too-long",
        "not-json",
    ]
    assert next(iter(read_rows(file_parts(path)[0], found[0].after, everything))).value == {"a": 1}


def test_a_json_list_names_the_lines_where_rows_begin(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('\ufeff[\n  {"a": 1},\n  {"a":\n   2},\n\n  {"a": 3}]\n')
    assert [(row.origin.line, row.value) for row in read(path)] == [(2, {"a": 1}), (3, {"a": 2}), (6, {"a": 3})]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_json_list_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(formats, "_CHUNK", chunk)
    rows = [{"a": "x" * k, "b": [k, {"c": "]}"}]} for k in range(20)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=2))
    assert [row.value for row in read(path)] == rows
    path.write_text("[12, 345 ,6]")
    assert [row.value for row in read(path)] == [12, 345, 6]


@pytest.mark.parametrize(
    ("text", "good", "line"),
    [
        ('[{"a": 1},\n {"a": 2', 1, 2),
        ('[{"a": 1},\n {"a": 2}', 2, 2),
        ('[{"a": 1}\n {"a": 2}]', 1, 2),
        ('[{"a": 1},\n oops, {"a": 2}]', 1, 2),
        ("[", 0, 1),
    ],
)
def test_a_damaged_json_list_is_read_up_to_the_damage(tmp_path, text, good, line):
    path = tmp_path / "rows.json"
    path.write_text(text)
    *rows, last = read(path)
    assert len(rows) == good
    assert (last.value.reason, last.origin.line, last.last) == ("not-json", line, True)


def test_json_lines_and_single_objects_under_the_name_json(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}\noops\n{"a": 2}\n')
    assert [getattr(row.value, "reason", row.value) for row in read(path)] == [{"a": 1}, "not-json", {"a": 2}]
    path.write_text('{\n"a": 1\n}\n{\n"a": 2\n}')
    assert [row.value for row in read(path)] == [{"a": 1}, {"a": 2}]


def test_tables_with_quotes_line_ends_and_other_separators(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufeffimage;caption\r\na.png;"A cat;\r\nasleep"\r\n\r\nb.png;שלום 🚀\r\nc.png\r\n'.encode())
    found = read(path)
    assert [row.origin.line for row in found] == [3, 5, 6]
    assert found[0].value == {"image": "a.png", "caption": "A cat;\r\nasleep"}
    assert found[1].value == {"image": "b.png", "caption": "שלום 🚀"}
    assert "1 cells, and the header 2" in str(found[2].value)
    (path := tmp_path / "rows.tsv").write_text("image\tcaption\na.png\tA, b; c\n")
    assert read(path)[0].value == {"image": "a.png", "caption": "A, b; c"}


@pytest.mark.slow
def test_a_quote_that_is_never_closed_is_one_bad_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('image,caption\na.png,"' + "x\n" * 100_000 + "b.png,y\n")
    found = read(path)
    assert isinstance(found[0].value, BadRecord)
    assert len(found) < 100_000


def test_the_rows_of_a_parquet_file_keep_their_numbers(tmp_path):
    path = write(tmp_path / "rows.parquet", [{"image": str(k), "caption": "x"} for k in range(7)])
    assert len(file_parts(path)) == 3
    assert [row.origin.line for row in read(path)] == [1, 2, 3, 4, 5, 6, 7]


def test_damaged_parquet_is_one_bad_row_per_place(tmp_path):
    path = write(tmp_path / "rows.parquet", [{"image": str(k) * 50, "caption": "x"} for k in range(7)])
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    assert [row.value.reason for row in read(path)] == ["unreadable-file"]
    path.write_bytes(data[:4] + b"\xff" * 60 + data[64:])
    found = read(path)
    assert found[0].value.reason == "unreadable-file"
    assert [row.origin.line for row in found[1:]] == [4, 5, 6, 7]


def test_a_tar_sample_is_its_members(tmp_path):
    path = tmp_path / "rows.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "x/1.jpg", b"one")
        add(tar, "x/1.txt", b"A cat.\n")
        add(tar, "y/1.png", b"two")
        add(tar, "y/1.json", b'{"caption": "A dog."}')
        add(tar, "2.0.png", b"three")
        add(tar, "2.1.png", b"four")
        add(tar, "2.json", b'{"texts": []}')
        add(tar, "3.json", b"oops")
        add(tar, "4.json", b'[{"role": "user"}]')
    found = read(path)
    assert [getattr(row.value, "reason", row.value) for row in found] == [
        {"image": "x/1.jpg", "caption": "A cat."},
        {"caption": "A dog.", "image": "y/1.png"},
        {"texts": [], "images": ["2.0.png", "2.1.png"]},
        "not-json",
        {"messages": [{"role": "user"}]},
    ]
    assert found[0].members["x/1.jpg"] == b"one"
    assert [(row.origin.line, row.origin.entry) for row in found] == [
        (1, "x/1"),
        (2, "y/1"),
        (3, "2"),
        (4, "3"),
        (5, "4"),
    ]


@pytest.mark.parametrize(("keep", "whole"), [(700, 0), (1536, 1), (1600, 1), (2600, 1), (2700, 2), (4608, 3)])
def test_a_tar_that_is_cut_off_is_read_up_to_there(tmp_path, keep, whole):
    path = tmp_path / "rows.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(3):
            add(tar, f"{number}.json", json.dumps({"a": "x" * 600, "n": number}).encode())
    path.write_bytes(path.read_bytes()[:keep])
    *good, last = read(path)
    assert [row.value["n"] for row in good] == list(range(whole))
    assert last.value.reason == "unreadable-file"
    assert last.last
