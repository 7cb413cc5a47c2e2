"""Trains casa-tiny: `python -m projects.casa_tiny.train runs/casa-tiny`.

    out/text/     tokenizer and text model          out/tower/   image tower, dense heads
    out/fusion/   the fused model                   out/final/   model and processor, ready for from_pretrained
    out/recipe.yaml                                 out/training.json   how it came about

A finished stage is never repeated; an unfinished one goes on from its last checkpoint.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
import yaml
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase, TrainerCallback
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from casa.atomic import write_text
from casa.errors import UserError
from casa.evaluation.stream import PROMPT
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.provenance import provenance
from projects.casa_tiny.chat import FRAME, IMAGE
from projects.casa_tiny.fusion import train_fusion
from projects.casa_tiny.recipe import CELL, RECIPE, Recipe, load_recipe
from projects.casa_tiny.text import train_text
from projects.casa_tiny.tower import MEAN, MERGE, PATCH, STD, train_tower

STAGES = ("text", "tower", "fusion")


def train(recipe: Recipe, out: Path, until: str = STAGES[-1], callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Runs the stages and returns the folder of the finished checkpoint, `out/final`.

    The same recipe and versions give the same weights on the same machine.

    Args:
        recipe: What to train.
        out: A new or empty folder, or that of a run of the same recipe, which goes on.
        until: The last stage to run; before the last of all, its own folder is returned.
        callbacks: Of transformers' Trainer, for every stage.

    Raises:
        UserError: `out` holds another run, or there is no such stage.
    """
    if until not in STAGES:
        raise UserError(f"There is no stage {until!r}; choose {', '.join(STAGES[:-1])} or {STAGES[-1]}.")
    _claim(recipe, out)
    for stage in STAGES[: STAGES.index(until) + 1]:
        if (out / stage).is_dir():
            continue
        if stage == "text":
            train_text(recipe, out, callbacks)
        elif stage == "tower":
            train_tower(recipe, out, callbacks)
        else:
            text = LlamaForCausalLM.from_pretrained(out / "text", attn_implementation="sdpa")
            tower = Qwen2_5_VisionTransformerPretrainedModel.from_pretrained(out / "tower", attn_implementation="sdpa")
            train_fusion(recipe, text, AutoTokenizer.from_pretrained(out / "text"), tower, out, callbacks)
    if until != STAGES[-1]:
        return out / until
    final = out / "final"
    model = CasaForConditionalGeneration.from_pretrained(out / "fusion")
    for part in (model.config, model.config.text_config, model.config.vision_config):
        part._name_or_path = ""  # where this machine keeps its stages is nobody's business
    model.save_pretrained(final)
    make_processor(AutoTokenizer.from_pretrained(out / "text"), recipe.fusion.largest).save_pretrained(final)
    facts = {"recipe": recipe.to_dict(), **provenance(), "stages": {stage: _facts(out / stage) for stage in STAGES}}
    write_text(out / "training.json", json.dumps(facts, indent=1) + "\n")
    _write_card(final, recipe, facts)
    return final


def make_processor(tokenizer: PreTrainedTokenizerBase, largest: int) -> CasaProcessor:
    """The processor of the model. Pictures of more than `largest` x `largest` px are made smaller."""
    pictures = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        temporal_patch_size=1,
        merge_size=MERGE,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
        size={"shortest_edge": (2 * CELL) ** 2, "longest_edge": largest**2},
    )
    return CasaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        chat_template=cast(str, tokenizer.chat_template),
        image_token=IMAGE,
        frame_suffix=FRAME,
        stream_prompt=PROMPT,
    )


def _claim(recipe: Recipe, out: Path) -> None:
    """Makes `out` this recipe's, or refuses in a sentence."""
    path = out / "recipe.yaml"
    values = yaml.safe_dump(_plain(recipe), sort_keys=False)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder to train in.")
    if path.is_file():
        if path.read_text(encoding="utf-8") != values:
            raise UserError(f"{out} holds a run of another recipe; give the same recipe, or another folder.")
        return
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no run; give an empty or a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, values)


def _plain(recipe: Recipe) -> Any:
    """The recipe as YAML takes it: with lists for tuples."""
    return json.loads(json.dumps(recipe.to_dict()))


def _facts(folder: Path) -> dict[str, Any]:
    """Steps, seconds (of the last call) and losses of a finished stage."""
    log = json.loads((folder / "log.json").read_text(encoding="utf-8"))
    curve = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    return {"steps": log[-1]["step"], "seconds": round(log[-1].get("train_runtime", 0.0), 1), "curve": curve}


def _write_card(folder: Path, recipe: Recipe, facts: dict[str, Any]) -> None:
    front = yaml.safe_dump(
        {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["casa"]}, sort_keys=False
    )
    rows = [
        f"| {stage} | {found['steps']:,} | {found['seconds']:,.0f} s | {found['curve'][-1][1]:.4f} |"
        for stage, found in facts["stages"].items()
    ]
    values = yaml.safe_dump(_plain(recipe), sort_keys=False, width=110)
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    parts = [
        f"---\n{front}---",
        f"# {recipe.name}",
        "Trained in stages, with [casa](https://arxiv.org/abs/2512.19535): a text model on the tasks' own text, an "
        "image tower on dense targets, then both"
        " together. Examples were drawn by seed while it learned.",
        "\n".join(["| stage | steps | time | last loss |", "|---|---|---|---|", *rows]),
        f"## Recipe\n\n```yaml\n{values}```",
        f"Seed {recipe.seed}, commit {facts['commit'] or 'unknown'}, {facts['threads']} threads; {versions}.",
    ]
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the run.")],
    until: Annotated[str, typer.Option(help="Last stage to run: text, tower or fusion.")] = STAGES[-1],
    recipe: Annotated[Path, typer.Option(help="A recipe.")] = RECIPE,
) -> None:
    """Train casa-tiny from its beginning; goes on by itself where it stopped."""
    chosen = load_recipe(recipe)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    try:
        print(train(chosen, out, until))
    except UserError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
