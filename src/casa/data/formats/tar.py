"""WebDataset tars: members in a row that share a name up to its first dot are one sample.

    0001.jpg 0001.json 0002.jpg 0002.txt ...

A .json member is the row, of any shape; pictures it does not mention by name are its `image` (or `images`). A .txt
member is the caption. Members are read in place; nothing is unpacked.
"""

import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from casa.data.bad import BadRecord
from casa.data.formats.jsonl import parsed
from casa.data.formats.row import LONGEST, Cursor, Piece, Row

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
_CAPTIONS = ("txt", "caption")


def read_tar_rows(piece: Piece, cursor: Cursor, mine: Callable[[int], bool]) -> Iterator[Row]:
    """The samples from `cursor` on; a sample's line is its number."""
    number, offset = cursor
    with piece.path.open("rb") as file:
        file.seek(offset)
        for members, after in _samples(file):
            number += 1
            if isinstance(members, BadRecord):
                if mine(number - 1):
                    yield Row(number, members, 0, (number, after), last=True)
                return
            if not mine(number - 1):
                continue
            large = sum(member.size for member in members)
            if large > LONGEST:
                bad = BadRecord("too-long", f"The sample has more than {LONGEST // 2**20} MiB: leave it out.")
                yield Row(number, bad, 0, (number, after))
                continue
            read = {member.name: _bytes(file, member) for member in members}
            if any(len(read[member.name]) < member.size for member in members):
                bad = BadRecord("unreadable-file", "The tar ends within this sample: copy it again.")
                yield Row(number, bad, 0, (number, after), last=True)
                return
            yield Row(number, _row(read), large, (number, after), read)


def _samples(file: BinaryIO) -> Iterator[tuple[list[tarfile.TarInfo] | BadRecord, int]]:
    """(members of a sample, the byte where the next begins), from where the file is."""
    held: list[tarfile.TarInfo] = []
    end = file.tell()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # tarfile remembers every member it met
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                if not member.isfile():
                    continue
                if held and _key(member.name) != _key(held[0].name):
                    yield held, end
                    held = []
                held.append(member)
                end = tar.offset
            file.seek(tar.offset)
            # tarfile takes the end of the file for the end of the tar, which has a mark of its own
            why = None if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE) else "it has no end"
    except (tarfile.TarError, EOFError) as error:
        why = str(error) or "cut off"
    if held:
        yield held, end
    if why is not None:
        yield BadRecord("unreadable-file", f"The file is no tar from here on ({why}): copy it again."), end


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _bytes(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


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
