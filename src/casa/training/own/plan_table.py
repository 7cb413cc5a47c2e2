"""A plan as tables for people."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from casa.analysis.budget_table import readable
from casa.training.own.plan import Plan


def tables(plan: Plan) -> Group:
    """What a run starts from, its sources, steps, parameters and memory."""
    return Group(_model(plan), _sources(plan), _steps(plan), _parameters(plan), _memory(plan))


def _model(plan: Plan) -> Text:
    model = plan.recipe.model
    if model.checkpoint is not None:
        told = f"CASA checkpoint {model.checkpoint}"
    else:
        fusion = model.fusion.to_dict() if model.fusion is not None else {}
        chosen = ", ".join(f"{key} {value}" for key, value in fusion.items() if value not in (None, False, 0))
        told = f"{model.backbone}" + (f" with the image encoder of {model.vision}" if model.vision else "")
        told += f"; fusion: {chosen or 'as adapt does it (CASA⊕ in every block)'}"
    lora = f"; LoRA of rank {model.lora.rank}" if model.lora is not None else ""
    return Text(f"{plan.recipe.name}: {told}{lora}\n")


def _sources(plan: Plan) -> Table:
    table = _table("Sources", "path", "subset", "share", "files")
    for source in plan.sources:
        files = "on the hub, not looked at" if source.files is None else f"{source.files:,}"
        table.add_row(source.path, source.subset or "", f"{100 * source.share:.1f} %", files)
    return table


def _steps(plan: Plan) -> Table:
    chosen, budget = plan.recipe.optimisation, plan.recipe.packing.budget
    constant = chosen.steps - chosen.warmup - chosen.decay
    table = _table("Steps", "", "")
    table.add_row(
        "steps", f"{chosen.steps:,}: {chosen.warmup:,} rising, {constant:,} constant, {chosen.decay:,} falling"
    )
    table.add_row("packs a step", f"{plan.packs:,} ({plan.processes:,} processes x {chosen.accumulate:,} accumulated)")
    table.add_row("a pack", f"at most {budget.text:,} text and {budget.image:,} image tokens")
    text, image = (plan.packs * chosen.steps * most for most in (budget.text, budget.image))
    table.add_row("the whole run", f"at most {readable(text, '')} text and {readable(image, '')} image tokens")
    table.add_row("checkpoints", f"every {plan.recipe.saving.every:,} steps, the newest {plan.recipe.saving.keep} kept")
    return table


def _parameters(plan: Plan) -> Table:
    table = _table("Parameters", "group", "rate", "count")
    for name, rate, count in plan.groups:
        table.add_row(name, "frozen" if rate is None else f"{rate:g}", f"{count:,}")
    return table


def _memory(plan: Plan) -> Table:
    table = _table(f"Memory of a process, for a full pack ({plan.recipe.optimisation.precision})", "", "")
    for name, size in plan.memory.items():
        table.add_row(name, readable(size, "B", 1024))
    table.add_row("together, about", readable(plan.memory_bytes, "B", 1024))
    table.caption = "without sharding; worked out from widths: work space of kernels comes on top"
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", caption_justify="left", show_edge=False, show_header=bool(columns[0])
    )
    for column in columns:
        table.add_column(column, justify="right" if column in ("share", "files", "rate", "count") else "left")
    return table
