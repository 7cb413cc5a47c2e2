"""The attention benchmark on the GPU: every contestant runs, agrees with the dense mask, and is timed by events."""

from casa.benchmarks.attention import AttentionShape, bench_attention
from casa.benchmarks.settings import AttentionSettings

SMALL = (
    AttentionShape("packed", 4, 200, (16, 60)),
    AttentionShape("decode", 8, 200, (1, 30), queries=1),
)


def test_all_contestants_agree_and_are_timed(device):
    found = bench_attention(AttentionSettings(str(device), repeats=2), SMALL)
    rows = found.figures["rows"]
    assert [row["shape"] for row in rows[:: len(rows) // 2]] == ["packed", "decode"]
    for row in rows:
        assert row["forward_ms"] is not None, row
        assert row["forward_ms"] > 0
        # in a rehearsal flex has no backward
        whole = device.type == "cuda" or row["impl"] != "flex"
        assert row["reason"] is None or not whole, row
        if row["shape"] == "packed" and whole:
            assert row["both_ms"] is not None
            assert row["both_ms"] > row["forward_ms"]
        if device.type == "cuda":
            assert row["difference"] is not None
            assert row["difference"] < 0.02, row  # a few roundings of bfloat16
            assert row["forward_tflops"] is not None
            assert 0 < row["forward_tflops"] < 2000
    assert "packed" in found.table
