"""train: a recipe's three stages one after the other, and the finished checkpoint.

    out/text/     tokenizer and text model          out/tower/   image tower, dense heads
    out/fusion/   the fused model                   out/final/   model and processor, ready for from_pretrained
    out/recipe.json                                 out/training.json   how it came about

A finished stage is never repeated; an unfinished one goes on from its last saved step.
"""

import json
import time
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from casa.atomic import write_text
from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.provenance import provenance
from casa.training.checkpoints import is_done, read_done
from casa.training.fusion import train_fusion
from casa.training.loop import Monitor, Report
from casa.training.patches import CELL, MEAN, MERGE, PATCH, STD
from casa.training.recipe import Recipe, parse_recipe, recipe_values
from casa.training.sources import Sources
from casa.training.stage_card import write_stage_card
from casa.training.text import train_text
from casa.training.tokenizer import FRAME, IMAGE
from casa.training.tower import train_tower

STAGES = ("text", "tower", "fusion")


def train(
    recipe: Recipe,
    sources: Sources,
    out: str | Path,
    *,
    resume: bool = True,
    until: str = STAGES[-1],
    progress: Report | None = None,
    monitor: Monitor | None = None,
) -> Path:
    """Runs a recipe and returns the folder of the finished checkpoint, `out/final`.

    resume: go on with what `out` holds of the same recipe; without it, `out` must be new or empty. until: the last
    stage to run, of `STAGES`; before the last of all, its own folder is returned, and a later call goes on behind it.
    progress: told how it goes (`print` will do). monitor: shown the model of a stage now and then. The same recipe,
    sources and versions give the same weights on the same machine. UserError if they do not fit, or `out` holds
    another run.
    """
    check_recipe(recipe, sources, until)
    out = Path(out)
    _claim(recipe, out, resume)
    threads = torch.get_num_threads()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    try:
        began = time.monotonic()
        text, tokenizer = _text(recipe, sources, out / "text", progress, monitor)
        if until == "text":
            return out / "text"
        tower = _tower(recipe, sources, out / "tower", progress, monitor)
        if until == "tower":
            return out / "tower"
        model = _fusion(recipe, sources, text, tokenizer, tower, out / "fusion", progress, monitor)
    finally:
        torch.set_num_threads(threads)
    final = out / "final"
    for part in (model.config, model.config.text_config, model.config.vision_config):
        part._name_or_path = ""  # where this machine keeps its stages is nobody's business
    model.save_pretrained(final)
    make_processor(tokenizer, sources.prompt, recipe.fusion.largest).save_pretrained(final)
    facts = _facts(recipe, out, time.monotonic() - began)
    write_text(out / "training.json", json.dumps(facts, indent=1) + "\n")
    write_stage_card(final, facts)
    return final


def check_recipe(recipe: Recipe, sources: Sources, until: str) -> None:
    """UserError unless there are such a stage and all the sources and channels that the recipe names."""
    if until not in STAGES:
        raise UserError(f"There is no stage {until!r}; choose {', '.join(STAGES[:-1])} or {STAGES[-1]}.")
    sources.check(recipe.tower.mix, "tower.mix", clips=False)
    sources.check(recipe.fusion.mix, "fusion.mix", clips=True)
    sources.check_channels(recipe.tower.channels, "tower.channels")


def make_processor(tokenizer: PreTrainedTokenizerBase, prompt: str, largest: int) -> CasaProcessor:
    """The processor of a model trained here. Pictures of more than `largest` x `largest` px are made smaller."""
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
        stream_prompt=prompt,
    )


def _text(recipe: Recipe, sources: Sources, folder: Path, report: Report | None, monitor: Monitor | None) -> Any:
    if not is_done(folder):
        return train_text(recipe, sources, folder, report, monitor)
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _tower(recipe: Recipe, sources: Sources, folder: Path, report: Report | None, monitor: Monitor | None) -> Any:
    if not is_done(folder):
        return train_tower(recipe, sources, folder, report, monitor)
    return Qwen2_5_VisionTransformerPretrainedModel.from_pretrained(folder, attn_implementation="sdpa")


def _fusion(
    recipe: Recipe,
    sources: Sources,
    text: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tower: Qwen2_5_VisionTransformerPretrainedModel,
    folder: Path,
    report: Report | None,
    monitor: Monitor | None,
) -> CasaForConditionalGeneration:
    if not is_done(folder):
        return train_fusion(recipe, sources, text, tokenizer, tower, folder, report, monitor)
    return CasaForConditionalGeneration.from_pretrained(folder)


def _claim(recipe: Recipe, out: Path, resume: bool) -> None:
    """Makes `out` this recipe's, or refuses in a sentence."""
    path = out / "recipe.json"
    values = json.loads(json.dumps(recipe_values(recipe)))
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder to train in.")
    if path.is_file():
        if not resume:
            raise UserError(f"{out} holds a run already; go on with it (resume), or give another folder.")
        if _same_form(json.loads(path.read_text(encoding="utf-8"))) != values:
            raise UserError(f"{out} holds a run of another recipe; give the same recipe, or another folder.")
        return
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no run; give an empty or a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=1) + "\n")


def _same_form(values: Any) -> Any:
    """What a recipe said when a run began, with what recipes have been able to say since then."""
    try:
        return json.loads(json.dumps(recipe_values(parse_recipe(values))))
    except UserError:
        return None


def _facts(recipe: Recipe, out: Path, seconds: float) -> dict[str, Any]:
    return {
        "recipe": recipe_values(recipe),
        "seed": recipe.seed,
        **provenance(),
        "seconds_of_this_call": round(seconds, 1),
        "stages": {stage: read_done(out / stage) for stage in STAGES},
    }
