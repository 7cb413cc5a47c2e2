"""The attention benchmark: it runs, says what it measured, and leaves the process as it was."""

import json
import sys

import pytest
import torch
from torch.nn.attention import flex_attention as flexible

from casa.attention import casa_attention, flex
from casa.benchmarks import attention as bench
from casa.benchmarks.attention import (
    CPU_SHAPES,
    CUDA_SHAPES,
    RIVALS,
    AttentionShape,
    Clock,
    Contestant,
    attention_table,
    race,
)
from casa.benchmarks.settings import AttentionSettings
from casa.errors import UserError
from casa.windows import WindowLayout

SMALL = (AttentionShape("even", 3, 4, (2, 2)), AttentionShape("ragged", 3, 4, (1, 5)))


def bench_attention(*shapes, **settings):
    """Its rows, with heads of 8."""
    chosen = AttentionSettings(**{"device": "cpu"} | settings)
    return bench.bench_attention(chosen, shapes or SMALL, heads=(8, 2, 8)).figures["rows"]


def test_rows_table_and_record():
    threads = torch.get_num_threads()
    found = bench.bench_attention(
        AttentionSettings("cpu", ("reference", "sdpa"), repeats=2, seed=3), SMALL, heads=(8, 2, 8)
    )
    rows = found.figures["rows"]
    assert torch.get_num_threads() == threads
    assert [(row["shape"], row["impl"]) for row in rows] == [
        (shape, impl) for shape in ("even", "ragged") for impl in ("dense mask", "reference", "sdpa")
    ]
    assert all(row["forward_ms"] > 0 and row["both_ms"] > 0 for row in rows)
    assert rows[0]["both_ratio"] == 1.0
    record = json.loads(json.dumps(found.record()))
    assert (record["versions"]["torch"], record["seed"], record["threads"]) == (torch.__version__, 3, threads)
    assert len(record["rows"]) == len(rows)
    assert set(record["rows"][0]) == {"shape", "impl", "forward_ms", "both_ms", "forward_ratio", "both_ratio", "reason"}
    assert all(word in found.table for word in ("even", "ragged", "sdpa", "dense mask", "1.0x"))


def test_shapes_are_those_of_the_promise():
    sizes = {(s.windows, s.image, s.text) for s in CPU_SHAPES}
    assert {(64, 64, (16, 16)), (16, 256, (64, 64)), (16, 256, (4, 90))} <= sizes
    layout = CPU_SHAPES[-1].layout(seed=1)
    assert layout.num_windows == 16
    assert layout == CPU_SHAPES[-1].layout(seed=1)
    assert layout != CPU_SHAPES[-1].layout(seed=2)


def test_shapes_on_cuda_are_the_papers_batch_and_decode_steps():
    packed, *_, decode = (shape.layout(seed=0) for shape in CUDA_SHAPES)
    assert (packed.num_text, packed.num_query, packed.num_image, packed.num_windows) == (2048, 2048, 20480, 16)
    assert (decode.num_query, decode.num_windows, decode.num_image) == (256, 256, 256 * 1024)
    assert all(window.num_query == 1 for window in decode.windows)


@pytest.mark.parametrize("shape", [*SMALL, AttentionShape("decode", 3, 4, (2, 5), queries=1)])
def test_work_counts_visible_pairs_and_each_tensor_once(shape):
    layout = shape.layout(seed=1)
    flops, moved = bench._work(layout, Hq=4, Hkv=2, D=8, size=2)
    assert flops == 4 * layout.mask().sum().item() * 4 * 8
    assert moved == 2 * 2 * 8 * (4 * layout.num_query + 2 * (layout.num_image + layout.num_text))


def test_a_decode_step_is_timed_forward_only():
    rows = bench_attention(AttentionShape("decode", 2, 4, (1, 3), queries=1), impls=("sdpa",), repeats=1)
    assert [(row["impl"], row["both_ms"], row["both_ratio"]) for row in rows] == [
        ("dense mask", None, None),
        ("sdpa", None, None),
    ]
    assert "-" in attention_table(rows).split()


@pytest.fixture
def uncompiled(monkeypatch, tmp_path):
    """flex as it is, but for the compiler: one is at hand, and what it would compile runs uncompiled."""

    def kernel(query, key, value, *, block_mask, **more):
        mask = flexible.create_mask(block_mask.mask_mod, 1, 1, query.shape[2], key.shape[2], device="cpu")
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, **more)

    (tmp_path / "my-compiler").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "my-compiler")
    monkeypatch.setattr(flex, "_compiled", lambda: kernel)


def test_flex_on_a_cpu_is_timed_forward_only_and_says_so(uncompiled):
    assert "flex" in bench.SETUPS["cpu"].impls
    rows = bench_attention(impls=("sdpa", "flex"), repeats=2)
    assert [row["impl"] for row in rows] == 2 * ["dense mask", "sdpa", "flex"]
    for _, sdpa, flexed in (rows[:3], rows[3:]):
        assert flexed["forward_ms"] is not None
        assert flexed["forward_ratio"] is not None
        assert (flexed["both_ms"], flexed["both_ratio"]) == (None, None)
        assert "flex has no backward on CPU" in flexed["reason"]
        assert sdpa["both_ms"] is not None
        assert sdpa["reason"] is None
    assert attention_table(rows).count(f"flex, forward only: {rows[2]['reason']}") == 1


def test_flex_that_has_no_backward_to_do_without_gives_no_reason(uncompiled):
    *_, flexed = bench_attention(AttentionShape("decode", 2, 4, (1, 3), queries=1), impls=("flex",), repeats=1)
    assert flexed["forward_ms"] is not None
    assert (flexed["both_ms"], flexed["reason"]) == (None, None)


def test_flex_without_a_compiler_is_left_out_and_says_so(uncompiled, monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler")
    rows = bench_attention(SMALL[0], impls=("flex", "sdpa"), repeats=1)
    _, flexed, sdpa = rows
    assert {flexed[name] for name in ("forward_ms", "both_ms", "forward_ratio", "both_ratio")} == {None}
    assert "no-compiler" in flexed["reason"]
    assert sdpa["both_ms"] is not None
    told = attention_table(rows)
    assert f"flex, not timed: {flexed['reason']}" in told
    assert "forward only" not in told


def test_a_compiler_that_fails_does_not_cost_the_others_their_turn(uncompiled, monkeypatch):
    def broken(*given, **more):
        raise RuntimeError("Python.h: no such file\nand much more")

    monkeypatch.setattr(flex, "_compiled", lambda: broken)
    _, flexed, sdpa = bench_attention(SMALL[0], impls=("flex", "sdpa"), repeats=1)
    assert (flexed["forward_ms"], flexed["reason"]) == (None, "RuntimeError: Python.h: no such file")
    assert sdpa["both_ms"] is not None


def test_table_of_a_gpu_says_what_was_reached_and_what_failed():
    names = ("forward_ms", "both_ms", "forward_ratio", "both_ratio", "forward_tflops", "both_tflops", "forward_tbps")
    names += ("host_ms", "difference")
    figures = dict(zip(names, (0.5, 2.0, 10.0, 8.0, 250.0, 218.75, 1.5, 0.2, 0.0039), strict=True))
    good = {"shape": "packed", "impl": "varlen", **figures, "reason": None}
    bad = {"shape": "packed", "impl": "flex", **dict.fromkeys(names), "reason": "RuntimeError: no Triton"}
    told = attention_table([good, bad])
    assert all(word in told for word in ("TFLOP/s", "250.0", "218.8", "1.50", "0.200", "0.0039", "8.0x"))
    assert "flex, not timed: RuntimeError: no Triton" in told


def test_on_a_gpu_one_that_fails_does_not_cost_the_others_their_turn(monkeypatch):
    """With a clock that says it is a GPU's and counts on the host."""
    layout = SMALL[0].layout(seed=0)
    sizes = [(layout.num_query, 4), *[(layout.num_text, 2)] * 2, *[(layout.num_image, 2)] * 2]
    tensors = [torch.randn(*size, 8) for size in sizes]
    clock = Clock(torch.device("cpu"))
    clock.cuda = True
    monkeypatch.setitem(RIVALS, "broken", lambda layout, device: lambda *given: given[99])
    contestants = [Contestant.rival(name, layout, clock, True) for name in ("dense mask", "broken")]
    contestants.append(Contestant.of_casa("sdpa", layout, clock, True, tensors[0]))
    race(contestants, tensors, repeats=2)
    dense, broken, sdpa = (one.figures(contestants[0], (2e9, 1e9)) for one in contestants)
    assert broken["reason"] == "IndexError: tuple index out of range"
    assert broken["forward_ms"] is None
    assert (dense["difference"], dense["reason"]) == (0.0, None)
    assert 0 <= sdpa["difference"] < 1e-5
    assert sdpa["forward_tflops"] == pytest.approx(2 / sdpa["forward_ms"])
    assert sdpa["both_tflops"] == pytest.approx(7 / sdpa["both_ms"])
    assert sdpa["forward_tbps"] == pytest.approx(1 / sdpa["forward_ms"])


def test_rivals_mean_the_same(monkeypatch):
    """On a CPU, torch's variable-length kernel and compiler replaced by plain stand-ins."""
    import torch.nn.attention.varlen as theirs

    def varlen_attn(q, k, v, ends_q, ends_k, max_q, max_k, *, window_size):
        assert window_size == (-1, 0)
        parts = []
        for n in range(len(ends_q) - 1):
            one, two, three = q[ends_q[n] : ends_q[n + 1]], k[ends_k[n] : ends_k[n + 1]], v[ends_k[n] : ends_k[n + 1]]
            mask = torch.ones(len(one), len(two), dtype=torch.bool).tril(len(two) - len(one))
            heads = (x.transpose(0, 1) for x in (one, two, three))
            parts.append(
                torch.nn.functional.scaled_dot_product_attention(*heads, mask, enable_gqa=True).transpose(0, 1)
            )
        return torch.cat(parts)

    def flex_attention(q, k, v, *, block_mask, enable_gqa):
        mask = flexible.create_mask(block_mask.mask_mod, 1, 1, q.shape[2], k.shape[2], device="cpu")
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=enable_gqa)

    monkeypatch.setattr(theirs, "varlen_attn", varlen_attn)
    monkeypatch.setattr(flexible, "flex_attention", flex_attention)
    monkeypatch.setattr(torch, "compile", lambda function, **more: function)
    for shape in (SMALL[1], AttentionShape("decode", 3, 4, (2, 5), queries=1)):
        layout = shape.layout(seed=1)
        sizes = [(layout.num_query, 4), *[(layout.num_text, 2)] * 2, *[(layout.num_image, 2)] * 2]
        given = [torch.randn(*size, 8, dtype=torch.float64) for size in sizes]
        want = casa_attention(*given, layout, impl="reference")
        for make in RIVALS.values():
            torch.testing.assert_close(make(layout, torch.device("cpu"))(*given), want)
    with pytest.raises(ValueError, match="images that open their windows"):
        RIVALS["FlexAttention"](WindowLayout.from_insertions([3], [[(0, 1)]], history=1), torch.device("cpu"))


@pytest.mark.parametrize(("more", "words"), [({"impls": ("spda",)}, "known are"), ({"repeats": 0}, "1 or more")])
def test_refusals(more, words):
    with pytest.raises(UserError, match=words):
        bench_attention(**more)
