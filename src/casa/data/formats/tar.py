"""WebDataset tars: members in a row that share a name up to its first dot are one sample.

    0001.jpg 0001.json 0002.jpg 0002.txt ...

A .json member is the row, of any shape; pictures it does not mention by name are its `image` (or `images`). A .txt
member is the caption. Members are read in place; nothing is unpacked.
"""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from casa.data.bad import BadRecord
from casa.data.formats.jsonl import parsed
from casa.data.formats.row import LONGEST, Cursor, Piece, Row, damage, open_file

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif")
_CAPTIONS = ("txt", "caption")


def read_tar_rows(piece: Piece, cursor: Cursor, mine: Callable[[int], bool]) -> Iterator[Row]:
    """The samples from `cursor` on; a sample's line is its number, and its key its entry."""
    before, offset = cursor
    with open_file(piece.path) as file:
        file.seek(offset)
        for number, sample in enumerate(_samples(file, before, mine), start=before + 1):
            if not mine(number - 1):
                continue
            value = sample.fault if sample.fault is not None else _row(sample.members)
            members = {} if sample.fault is not None else sample.members
            size = sum(map(len, members.values()))
            yield Row(number, value, size, (number, sample.end), members, sample.last, sample.key)


@dataclass
class _Sample:
    """members: what was read, by name. size: of all of them. end: the byte where the next sample begins."""

    key: str
    end: int = 0
    size: int = 0
    members: dict[str, bytes] = field(default_factory=dict)
    fault: BadRecord | None = None
    last: bool = False


def _samples(file: BinaryIO, number: int, mine: Callable[[int], bool]) -> Iterator[_Sample]:
    """The samples from where the file is, that of `number` (from 0) first; only those that are `mine` are read.

    Members are read as they come, so that a compressed file is never gone back in.
    """
    held: _Sample | None = None
    end = file.tell()
    why: str | None = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # tarfile remembers every member it met
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                if not member.isfile():
                    continue
                key = _key(member.name)
                if held is not None and key != held.key:
                    yield held
                    held, number = None, number + 1
                if held is None:
                    held = _Sample(key)
                held.size += member.size
                held.end = end = tar.offset
                if held.size > LONGEST:
                    held.members.clear()
                    held.fault = BadRecord(
                        "too-long", f"The sample has more than {LONGEST // 2**20} MiB: leave it out."
                    )
                elif mine(number):
                    file.seek(member.offset_data)
                    held.members[member.name] = file.read(member.size)
                    if len(held.members[member.name]) < member.size:
                        held.fault = BadRecord("unreadable-file", "The tar ends within this sample: copy it again.")
                        held.last = True
                        break
            else:
                file.seek(tar.offset)
                # tarfile takes the end of the file for the end of the tar, which has a mark of its own
                why = None if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE) else "it has no end"
    except (tarfile.TarError, *damage()) as error:
        why = str(error) or "cut off"
    if held is not None:
        yield held
    if why is not None:
        fault = BadRecord("unreadable-file", f"The file is no tar from here on ({why}): copy it again.")
        yield _Sample("", end, fault=fault, last=True)


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _row(members: dict[str, bytes]) -> Any:
    """One row from the members of a sample, or a BadRecord."""
    row: dict[str, Any] = {}
    pictures, captions = [], []
    for name in sorted(members):
        ending = name.rpartition(".")[2].lower()
        if ending == "json":
            value = parsed(members[name])
            if isinstance(value, BadRecord):
                return BadRecord("not-json", f"{name} is no JSON: mend or remove it.")
            row |= value if isinstance(value, dict) else {"messages": value}
        elif ending in _PICTURES:
            pictures.append(name)
        elif ending in _CAPTIONS:
            captions.append(members[name].decode("utf-8", "surrogateescape"))
    if captions and not row.keys() & {"messages", "conversations", "texts", "caption"}:
        row["caption"] = captions[0].strip()
    if pictures and not any(row.get(key) for key in ("image", "images", "video")):
        row |= {"image": pictures[0]} if len(pictures) == 1 else {"images": pictures}
    return row
