"""The report of bad records: counted, named once, bounded, and never in the way of a run."""

import json
import pickle

import pytest

from casa.data import BadRecord, BadRecordReport, Origin
from casa.data import record as record_module
from casa.data.record import read_report
from casa.errors import UserError

GONE = BadRecord("missing-picture", "There is no picture a.png: check the path.")


def test_each_origin_is_named_once_and_counted_every_time(tmp_path):
    path = tmp_path / "bad.jsonl"
    for _ in range(2):  # a run, and the run that resumes it
        report = BadRecordReport(path)
        for line in (3, 3, 4):
            report.add(Origin("שלום.jsonl", line), GONE)
        assert report.counts == {"missing-picture": 3}
        assert report.total == 3
    named = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [entry["origin"] for entry in named] == ["שלום.jsonl:3", "שלום.jsonl:4"]
    assert named[0] == {"origin": "שלום.jsonl:3", "reason": "missing-picture", "why": str(GONE)}


def test_a_line_cut_off_by_a_crash_is_ended(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"origin": "x:1"')
    BadRecordReport(path).add(Origin("x", 2), GONE)
    assert json.loads(path.read_text().splitlines()[1])["origin"] == "x:2"


def test_a_report_is_read_line_by_line_whatever_stands_in_it(tmp_path):
    path = tmp_path / "bad.jsonl"
    report = BadRecordReport(path)
    report.add(Origin("a\u2028b.jsonl", 1), BadRecord("wrong-type", "A value is 'x\u2028y\x85z'."))
    report.add(Origin("c.jsonl", 2), GONE)
    path.write_bytes(path.read_bytes() + b'[]\n{"origin": "x:3"}\n\xff\n{"origin": "d.jso')
    wanted = [("a\u2028b.jsonl:1", "wrong-type"), ("c.jsonl:2", "missing-picture")]
    assert list(read_report(path.read_bytes())) == wanted


def test_the_file_and_the_memory_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "MAX_LINES", 5)
    monkeypatch.setattr(record_module, "MAX_KEPT", 3)
    report = BadRecordReport(tmp_path / "bad.jsonl")
    for line in range(10):
        report.add(Origin("x", line), GONE)
    assert report.total == 10
    assert len(report.first) == 3
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 5


def test_a_report_that_cannot_be_written_stops_nothing(tmp_path):
    report = BadRecordReport(tmp_path / "no folder" / "bad.jsonl")
    report.add(Origin("x", 1), GONE)
    report.add(Origin("x", 2), GONE)
    assert report.total == 2
    assert report.unwritten is not None
    assert "No such file" in report.unwritten


def test_strict_stops_at_the_line():
    with pytest.raises(UserError, match=r"^x\.jsonl:3: There is no picture"):
        BadRecordReport(strict=True).add(Origin("x.jsonl", 3), GONE)


def test_it_crosses_processes():
    again = pickle.loads(pickle.dumps(GONE))
    assert (again.reason, str(again)) == (GONE.reason, str(GONE))


def test_half_a_character_in_a_name_is_no_obstacle(tmp_path):
    BadRecordReport(tmp_path / "bad.jsonl").add(Origin("\udcff.jsonl", 1), GONE)
    assert "?.jsonl:1" in (tmp_path / "bad.jsonl").read_text()
