"""`casa data make`: the offline tasks as files, which `casa data check` finds nothing wrong with."""

import json

import pytest


@pytest.mark.slow
def test_what_is_made_can_be_trained_on(casa, tmp_path):
    out = tmp_path / "tiny"
    result = casa("data", "make", out, "--pages", 3, "--scenes", 2, "--clips", 1, "--largest", 140)
    assert result.status == 0, result.err
    assert "3 pages, 2 scenes, 1 clips" in result.out
    assert {path.name for path in out.iterdir()} == {"pages.tar", "scenes.tar", "clips.jsonl", "clips"}
    for name, count in (("pages.tar", 3), ("scenes.tar", 2), ("clips.jsonl", 1)):
        found = json.loads(casa("data", "check", out / name, "--json").out)
        assert (found["records"], found["bad"]) == (count, 0)
    again = casa("data", "make", out)
    assert again.status == 2
    assert "exists already" in again.err


def test_nothing_to_make(casa, tmp_path):
    result = casa("data", "make", tmp_path / "a", "--pages", 0, "--scenes", 0, "--clips", 0)
    assert result.status == 2
    assert "nothing is asked for" in result.err


@pytest.mark.parametrize("option", [("--pages", "-1"), ("--largest", "50")])
def test_numbers_that_cannot_be(casa, tmp_path, option):
    assert casa("data", "make", tmp_path / "a", *option).status == 2
