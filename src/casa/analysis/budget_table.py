"""Budgets as tables for people: what training holds, what a stream holds, what is computed."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from casa.analysis.budget import Budget


def readable(count: float, unit: str, step: int = 1000) -> str:
    """Three digits and a unit: 3.75 B parameters are "3.75 G", 2048 bytes in steps of 1024 "2 KiB"."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"] if step == 1000 else ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]
    level = 0
    # 999.6 would be printed as 1e+03
    while count >= 999.5 and level < len(prefixes) - 1:
        count /= step
        level += 1
    places = 0 if count >= 99.95 or count == int(count) else 1 if count >= 9.995 else 2
    digits = f"{count:.{places}f}"
    return f"{digits} {prefixes[level]}{unit}".rstrip()


def _bytes(count: int) -> str:
    return readable(count, "B", 1024) if count else "0"


def _count(count: int) -> str:
    return readable(count, "") if count else "0"


def tables(budgets: Sequence[Budget]) -> Group:
    """Three tables, one row per method."""
    return Group(_training(budgets), _holding(budgets), _computing(budgets))


def _table(title: str, columns: Sequence[str], caption: str) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", show_edge=False)
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _after(frames: int) -> str:
    return f"after {frames} frame{'s' if frames > 1 else ''}"


def _training(budgets: Sequence[Budget]) -> Table:
    table = _table(
        "Parameters, and bytes that training holds",
        ["frozen", "trained, existing", "trained, new", "weights", "gradients", "AdamW", "fp32 copies", "together"],
        "AdamW: two float32 moments; fp32 copies of trained weights; activations come on top",
    )
    for b in budgets:
        counts = map(_count, (b.frozen, b.existing, b.new))
        sizes = (b.weight_bytes, b.gradient_bytes, b.moment_bytes, b.master_bytes, b.training_bytes)
        table.add_row(b.name, *counts, *map(_bytes, sizes))
    return table


def _holding(budgets: Sequence[Budget]) -> Table:
    frames = [moment.frames for moment in budgets[0].moments] if budgets else []
    table = _table(
        "What a stream holds",
        ["tokens a frame", "a frame", "kept", "a text token", "+ in its window", *(_after(n) for n in frames)],
        "keys and values of all layers",
    )
    for b in budgets:
        table.add_row(
            b.name,
            str(b.frame_tokens),
            _bytes(b.frame_bytes),
            "for ever" if b.frame_stays else "while visible",
            _bytes(b.text_token_bytes),
            _bytes(b.window_token_bytes),
            *(_bytes(moment.cache_bytes) for moment in b.moments),
        )
    return table


def _computing(budgets: Sequence[Budget]) -> Table:
    frames = [moment.frames for moment in budgets[0].moments] if budgets else []
    table = _table(
        "Floating-point operations",
        [*(f"frame {n}" for n in frames), *(f"a token after {n}" for n in frames)],
        "products of matrices, two operations per multiplication; a frame's include the image encoder's",
    )
    for b in budgets:
        amounts = [*(m.frame_flops for m in b.moments), *(m.token_flops for m in b.moments)]
        table.add_row(b.name, *(readable(amount, "FLOP") for amount in amounts))
    return table
