"""Prometheus' text: every figure with its kind, buckets that add up."""

import re
from pathlib import Path

from casa.serving.metrics import BUCKETS, COUNTERS, GAUGES, Metrics


def test_the_text_holds_every_figure():
    metrics = Metrics()
    metrics.count("frames")
    for _ in range(3):
        metrics.count("dropped")
    for seconds in (0.02, 0.2, 99.0):
        metrics.observe(seconds)
    text = metrics.text(dict.fromkeys(GAUGES, 7)).decode()
    assert text.endswith("\n")
    found = re.findall(r"^(casa_\S+) (\S+)$", text, re.MULTILINE)
    # the library also tells since when it counts
    figures = {name: float(value) for name, value in found if not name.endswith("_created")}
    assert figures["casa_frames_total"] == 1
    assert figures["casa_dropped_total"] == 3
    assert figures["casa_cache_bytes"] == 7
    assert len(figures) == len(COUNTERS) + len(GAUGES) + len(BUCKETS) + 3
    buckets = [value for name, value in figures.items() if "_bucket" in name]
    assert buckets == sorted(buckets)
    assert (buckets[0], buckets[1], buckets[-2], buckets[-1]) == (0, 1, 2, 3)
    assert figures["casa_lag_seconds_count"] == 3
    assert figures["casa_lag_seconds_sum"] == 99.22
    kinds = re.findall(r"^# TYPE (\S+) (?:counter|gauge|histogram)$", text, re.MULTILINE)
    assert len([name for name in kinds if not name.endswith("_created")]) == len(COUNTERS) + len(GAUGES) + 1


def test_every_counter_is_counted_somewhere():
    folder = Path(__file__).resolve().parents[2] / "src/casa/serving"
    source = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    assert set(re.findall(r'\.count\("(\w+)"', source)) == set(COUNTERS)
