"""The house stays small: few files, none long, few tiny ones, and no more lines than it has."""

from pathlib import Path

import pytest

import casa

SOURCE = Path(casa.__file__).parent
MAX_FILE_LINES = 500
MAX_FILES = 200
TINY_LINES, MAX_TINY_FILES = 60, 30
MAX_LINES = 41_589
LONGER: dict[str, int] = {}  # files that are still too long, and may not grow


def violations(root: Path, longer: dict[str, int], max_lines: int) -> list[str]:
    """Sentences about what is too large below `root`."""
    lines = {
        path.relative_to(root).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in sorted(root.rglob("*.py"))
    }
    tiny = [name for name, count in lines.items() if count < TINY_LINES]
    found = [
        f"{name} has {count} lines; at most {allowed}"
        for name, count in lines.items()
        if count > (allowed := longer.get(name, MAX_FILE_LINES))
    ]
    for number, most, what in (
        (len(lines), MAX_FILES, "files"),
        (len(tiny), MAX_TINY_FILES, f"files under {TINY_LINES} lines"),
        (sum(lines.values()), max_lines, "lines"),
    ):
        if number > most:
            found.append(f"the package has {number:,} {what}; at most {most:,}")
    return found


def test_the_package_is_no_larger_than_agreed():
    assert violations(SOURCE, LONGER, MAX_LINES) == []


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([501], ["a0.py has 501 lines"]),
        ([60] * 201, ["201 files"]),
        ([59] * 31, ["31 files under 60"]),
        ([400] * 3, ["1,200 lines"]),
        ([500, 60], []),
    ],
)
def test_the_look_can_fail(tmp_path, lines, words):
    for number, count in enumerate(lines):
        (tmp_path / f"a{number}.py").write_text("pass\n" * count)
    max_lines = 1000 if lines[0] == 400 else 50_000
    found = violations(tmp_path, {}, max_lines)
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))
