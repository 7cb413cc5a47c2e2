"""Panels: from 0 on, with room above, whatever the lines are."""

import pytest

from casa.benchmarks.plots import finish, panels


@pytest.mark.parametrize("line", [[600.0, 601.0], [0.0, 50.0, 20.0]])
def test_no_line_lies_on_the_upper_edge(tmp_path, line):
    figure, (axes,) = panels(1)
    axes.plot(line, label="a line")
    finish(figure, [axes], tmp_path / "a.png")
    assert axes.get_ylim() == pytest.approx((0, 1.1 * max(line)))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
