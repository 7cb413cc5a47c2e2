"""The model of a run: read and fused, put under LoRA, outlined without weights, and written as a plain folder."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from casa.errors import UserError
from casa.models import CasaConfig, CasaForConditionalGeneration, CasaProcessor, FusionConfig, adapt
from casa.models.adapt import has_own_tower, skeleton
from casa.models.auto import auto_processor
from casa.models.convert import check_new, new_folder
from casa.models.generation import stop_ids
from casa.models.image_processing_casa import bounds
from casa.models.loading import UNREADABLE, check_folder, place_of, quietly, read_config, resolve, sentence_of
from casa.settings import near
from casa.training.checkpoints import EMA_FILE, newest_checkpoint
from casa.training.config import LoraSettings, ModelSettings, Recipe, parse_recipe
from casa.training.fsdp import has_shards, read_whole_weights
from casa.training.optimizer import choose_trained, set_precision
from casa.vision import tower_config_of

# published models whose shapes casa.analysis has, by their names on the hub
PUBLISHED = {
    "kyutai/helium-1-2b": "helium-2b",
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5-vl-3b",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5-vl-7b",
}
RECIPE = "recipe.yaml"  # in the folder of a run
_BESIDE = ["*.json", "*.jinja", "*.txt", "*.model"]  # what a model's folder holds besides weights
_WEIGHTS = ["*.safetensors"]
_NO_ENCODER = "set model.vision to the folder of one"
_IN_FULL = ("projector", "compressor", "gist")  # what is trained in full beside adapters
_FUSION = "casa_layers"
_ADAPTERS, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_STATE = "trainer_state.json"


@dataclass
class LoadedModel:
    """What a run trains.

    Attributes:
        model: A CasaForConditionalGeneration, or a PeftModel around one.
        stop: The id that ends an answer.
    """

    model: Any
    processor: CasaProcessor
    stop: int | None


def load_model(recipe: Recipe) -> LoadedModel:
    """Reads the weights, fuses what is to be fused, and puts adapters in. What is new is drawn by the recipe's seed.

    Raises:
        UserError: Something is not there, cannot be read, or does not fit together.
    """
    settings = recipe.model
    processor = load_processor(settings)
    torch.manual_seed(recipe.seed)
    with quietly():
        if settings.checkpoint is not None:
            folder = _fetched(settings.checkpoint, weights=True)
            model = CasaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, settings.dtype))
        else:
            folder = _fetched(settings.backbone, weights=True)
            vision = None if settings.vision is None else _fetched(settings.vision, weights=True)
            model = adapt(str(folder), settings.fusion, None if vision is None else str(vision))
    for part in (model.config, model.config.text_config, model.config.vision_config):
        if part is not None:
            part._name_or_path = ""  # where this machine keeps its models is nobody's business
    # parameters only: buffers of rotary positions are as wide as they must be
    kept = torch.float32 if recipe.optimisation.precision == "float32" else getattr(torch, settings.dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kept)
    stop = next(iter(stop_ids(model)), None)
    return LoadedModel(model if settings.lora is None else with_lora(model, settings.lora), processor, stop)


def outline(recipe: Recipe) -> Any:
    """The same model on the meta device: names and shapes, what is trained, and in which precision it is kept.

    Of the published models in `PUBLISHED`, nothing is fetched. Raises UserError like `load_model`.
    """
    settings = recipe.model
    if settings.checkpoint is not None:
        config = CasaConfig.from_pretrained(_fetched(settings.checkpoint))
        with torch.device("meta"):
            model = CasaForConditionalGeneration(config)
    else:
        config = _config(settings.backbone)
        tower = None if settings.vision is None else tower_config_of(_config(settings.vision))
        if tower is None and not has_own_tower(config):
            raise UserError(f"a text-only model needs an image encoder; {_NO_ENCODER}.")
        model = skeleton(config, settings.fusion or FusionConfig(), tower)
    for parameter in model.parameters():
        # as it is read, until the precision is set
        parameter.data = parameter.data.to(torch.float32)
    prepared = model if settings.lora is None else with_lora(model, settings.lora)
    choose_trained(prepared, recipe.optimisation)
    set_precision(prepared, recipe.optimisation)
    return prepared


def load_processor(settings: ModelSettings) -> CasaProcessor:
    """The processor beside the model; nothing else of it is fetched. Raises UserError where there is none."""
    gist = 0 if settings.fusion is None else settings.fusion.gist
    if settings.processor is not None:
        processor = CasaProcessor.from_pretrained(settings.processor)
    elif settings.checkpoint is not None:
        processor = CasaProcessor.from_pretrained(_fetched(settings.checkpoint))
    else:
        vision = None if settings.vision is None else _fetched(settings.vision)
        processor = auto_processor(_fetched(settings.backbone), vision, gist, _NO_ENCODER)
    if settings.checkpoint is None and len(processor.gist_ids) != gist:
        raise UserError(
            f"the processor writes {len(processor.gist_ids)} gist tokens behind a picture, and model.fusion.gist is "
            f"{gist}; give the same, or leave model.processor out."
        )
    if settings.max_pixels is not None:
        for name, value in bounds(processor.image_processor, max_pixels=settings.max_pixels).items():
            setattr(processor.image_processor, name, value)
    return processor


def _config(name: Any) -> Any:
    from casa.analysis.published_models import published_config

    if name in PUBLISHED and not Path(name).is_dir():
        return published_config(PUBLISHED[name])
    return read_config(_fetched(name))


def _fetched(name: Any, weights: bool = False) -> Path:
    """The folder of a model; a hub's is fetched, its weights only if they are wanted."""
    found = resolve(name)
    path = Path(str(found))
    if place_of(name)[1]:
        return path
    check_folder(found)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=_BESIDE + (_WEIGHTS if weights else [])))
    except UNREADABLE as error:
        raise UserError(f"{name} cannot be fetched from the hub: {sentence_of(error)}") from error


def with_lora(model: CasaForConditionalGeneration, settings: LoraSettings) -> Any:
    """The model under PEFT: only adapters, and what is trained in full, require gradients. The model is changed.

    Raises:
        UserError: PEFT is not installed, or a target names no linear layer of the text model.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("model.lora needs PEFT: pip install peft.") from error
    blocks = {id(part) for block in model.decoder.blocks for part in block.modules()}
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    inside = [name for name, part in linear.items() if id(part) in blocks]
    names = {name.rpartition(".")[2] for name in inside}
    for target in settings.target_modules:
        if target not in names:
            raise UserError(
                f"model.lora.target_modules: no linear layer is called {target!r}; {near(target, sorted(names))}"
            )
    adapted, in_full = inside, [name for name in _IN_FULL if getattr(model, name, None) is not None]
    if settings.added == "full":
        layers = model.casa_layers
        in_full += [f"{_FUSION}.{key}" for key in layers if any(True for _ in layers[key].parameters())]
    else:
        adapted = [*inside, *(name for name in linear if name.startswith(f"{_FUSION}."))]
    chosen = [name for name in adapted if name.rpartition(".")[2] in settings.target_modules]
    model.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=chosen,
        modules_to_save=in_full or None,
    )
    with warnings.catch_warnings():
        # PEFT asks by a name that newer transformers call old: nothing that a user could mend
        warnings.filterwarnings("ignore", ".*gradient_checkpointing. is deprecated", FutureWarning)
        return get_peft_model(model, config)  # type: ignore[arg-type]


def export_checkpoint(
    checkpoint: str | Path, out: str | Path, *, average: bool = False, dtype: torch.dtype | None = None
) -> Path:
    """Writes a checkpoint as the new folder `out` for `from_pretrained`: config, safetensors, processor.

    The model is in memory once meanwhile. LoRA's adapters are merged into the model that the run began from, as its
    recipe beside the checkpoint names it.

    Args:
        checkpoint: A `checkpoint-<step>` of a run with DDP or FSDP2.
        average: Its running average (EMA) in place of the last weights.
        dtype: Of all weights; theirs if left out.

    Raises:
        UserError: It is no whole checkpoint, or holds no average, or `out` exists.
    """
    source = Path(checkpoint)
    # before anything is read: the largest models take minutes
    check_new(out)
    _check_checkpoint(source)
    if (source / _ADAPTER_CONFIG).is_file():
        model = _merged_adapters(source, average)
    elif has_shards(source):
        model = _from_shards(source, average)
    else:
        model = CasaForConditionalGeneration.from_pretrained(source, dtype="auto")
        if average:
            _put_averages(model, source)
    if dtype is not None:
        nn.Module.to(model, dtype=dtype)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        if (source / "processor_config.json").is_file() or (source / "preprocessor_config.json").is_file():
            CasaProcessor.from_pretrained(source).save_pretrained(folder)
    return Path(out)


def _check_checkpoint(source: Path) -> None:
    if not source.is_dir():
        raise UserError(f"there is no checkpoint at {source}: give a folder checkpoint-<step> of a run.")
    if source.name.startswith("."):
        raise UserError(f"{source} was never finished: give the folder of a whole checkpoint.")
    if (source / _STATE).is_file():
        return
    if (newest := newest_checkpoint(source)) is not None:
        raise UserError(f"{source} is a run: give one of its checkpoints, such as {newest}.")
    raise UserError(f"{source} is no checkpoint of a run, it has no {_STATE}: give a folder checkpoint-<step>.")


def _put_averages(model: nn.Module, source: Path) -> None:
    if not (source / EMA_FILE).is_file():
        raise UserError(f"{source} holds no running average: export its last weights.")
    averages = load_file(source / EMA_FILE)
    for name, parameter in model.named_parameters():
        if name in averages:
            parameter.data = averages[name].to(parameter.dtype)


def _from_shards(source: Path, average: bool) -> CasaForConditionalGeneration:
    config = CasaConfig.from_pretrained(source)
    # an outline: all that a folder keeps is in the shards, and what is not (tables of rotary positions) it never had
    with torch.device("meta"):
        model = CasaForConditionalGeneration(config)
    _, surplus = model.load_state_dict(read_whole_weights(source, average), strict=False, assign=True)
    model.tie_weights()
    lost = [name for name, value in model.state_dict().items() if value.is_meta]
    if lost or surplus:
        raise UserError(f"the weights in {source} are not those of its config: the first is {(lost or surplus)[0]}.")
    return model


def _merged_adapters(checkpoint: Path, average: bool) -> CasaForConditionalGeneration:
    """The model of a checkpoint of adapters, these merged into what the run began from."""
    path = checkpoint.absolute().parent / RECIPE
    if not path.is_file():
        raise UserError(
            f"{checkpoint} holds LoRA adapters, and there is no {path}, which names the model that they belong to: "
            "put the recipe of the run there."
        )
    recipe = parse_recipe(yaml.safe_load(path.read_text(encoding="utf-8")))
    if recipe.model.lora is None:
        raise UserError(
            f"{checkpoint} holds LoRA adapters, and the recipe of {path} has none: put the run's own there."
        )
    model = load_model(recipe).model
    # only now: where PEFT is not installed, `with_lora` has said so
    from peft import set_peft_model_state_dict

    choose_trained(model, recipe.optimisation)
    set_precision(model, recipe.optimisation)
    found = set_peft_model_state_dict(model, load_file(checkpoint / _ADAPTERS))
    lost = [name for name in found.missing_keys if "lora_" in name or "modules_to_save" in name]
    if lost or found.unexpected_keys:
        raise UserError(
            f"the adapters in {checkpoint} are not those of {path}: the first is {[*lost, *found.unexpected_keys][0]}."
        )
    if average:
        _put_averages(model, checkpoint)
    merged = model.merge_and_unload()
    if recipe.optimisation.precision == "bfloat16":
        # as the run's own end is written: masters are kept in checkpoints only
        nn.Module.to(merged, dtype=torch.bfloat16)
    return merged
