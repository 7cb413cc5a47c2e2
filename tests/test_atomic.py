"""Files appear whole or not at all."""

import os

import pytest

from casa.atomic import check_writable, replacing, write_text
from casa.errors import UserError


def test_the_file_appears_only_at_the_end(tmp_path):
    target = tmp_path / "a.txt"
    with replacing(target) as unfinished:
        unfinished.write_text("new")
        assert not target.exists()
        assert unfinished.parent == tmp_path
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fails():
        with replacing(target) as unfinished:
            unfinished.write_text("half")
            raise error

    with pytest.raises(error):
        fails()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_permissions_and_links_are_kept(tmp_path):
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_text(link, "new\n")
    assert link.is_symlink()
    assert real.read_bytes() == b"new\n"
    assert real.stat().st_mode & 0o777 == 0o640


def test_a_new_file_follows_the_umask(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_long_name_is_fine(tmp_path):
    write_text(tmp_path / ("n" * 251 + ".srt"), "text")
    assert len(os.listdir(tmp_path)) == 1


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="is a directory"):
        write_text(tmp_path, "")
    with pytest.raises(UserError, match="does not exist"):
        write_text(tmp_path / "no" / "a.txt", "")
    with pytest.raises(UserError, match="not a regular file"):
        write_text("/dev/null", "")


def test_a_look_whether_a_file_can_be_written_changes_nothing(tmp_path):
    there = tmp_path / "a.json"
    there.write_text("old")
    before = there.stat()
    check_writable(there, None, tmp_path / "new.json")
    assert (there.read_text(), there.stat().st_mtime_ns) == ("old", before.st_mtime_ns)
    assert os.listdir(tmp_path) == ["a.json"]
    for path, why in ((tmp_path, "is a directory"), (tmp_path / "none" / "a.json", "does not exist")):
        with pytest.raises(UserError, match=why):
            check_writable(path)
