"""DejaVu Sans is found where matplotlib is installed, which is not imported for it."""

import pytest

from casa.media import fonts


def test_it_lies_in_matplotlib(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    plain, bold = fonts.dejavu(), fonts.dejavu(bold=True)
    assert plain is not None
    assert bold is not None
    assert (plain.name, bold.name) == ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")
    empty = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    for found in (None, type("Spec", (), {"origin": None}), empty):
        monkeypatch.setattr(fonts, "find_spec", lambda name, found=found: found)
        assert fonts.dejavu() is None
