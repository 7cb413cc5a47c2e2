"""Loading a checkpoint, or saying in one sentence why it cannot be loaded.

Only JSON, safetensors and GGUF are read: no pickle, no code from the checkpoint.
"""

import copy
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from casa.errors import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED = ("casa-tiny", "casa-smol")


def shipped() -> list[str]:
    """Names of the models that this copy of casa has the weights of."""
    return [name for name in SHIPPED if (ASSETS / name).is_dir()]


def resolve(name_or_path: Any) -> Any:
    """The folder of a shipped checkpoint (UserError if it is not there), or of a package's; all else stays as it is."""
    if not isinstance(name_or_path, str) or os.path.exists(name_or_path):
        return name_or_path
    if name_or_path in SHIPPED:
        if not (ASSETS / name_or_path).is_dir():
            raise UserError(f"this copy of casa is without the weights of {name_or_path}; install a release with them.")
        return str(ASSETS / name_or_path)
    try:
        files = importlib.metadata.files(name_or_path) or ()
    except (ModuleNotFoundError, ValueError):  # no package, or no name of one
        return name_or_path
    folders = {str(Path(str(file.locate())).parent) for file in files if file.suffix in (".gguf", ".safetensors")}
    return folders.pop() if len(folders) == 1 else name_or_path


def is_own(place: Any) -> bool:
    """Whether a folder holds a model of casa's own."""
    try:
        config = json.loads((Path(str(place)) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # what is wrong with it is said by whoever loads it
        return False
    return isinstance(config, dict) and config.get("model_type") == "casa"


@contextmanager
def quietly(reports: bool = True) -> Iterator[None]:
    """No progress bars inside, and afterwards as before. reports: warnings stay; without them, errors alone."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not reports:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# what transformers, safetensors and the checks of config values raise over a damaged checkpoint, or over a way of
# loading that needs another package (quantisation)
UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, ImportError, SafetensorError, StrictDataclassError)


def gguf_file(name: Any) -> Path | None:
    """The GGUF file that a name is of, if it is. Raises UserError where there are several, or one part of several."""
    path = Path(str(resolve(name)))
    files = [path] if path.suffix == ".gguf" and path.is_file() else []
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{name} has several GGUF files; give the path of one: {', '.join(f.name for f in files)}.")
    if files and re.search(r"-\d+-of-\d+\.gguf$", files[0].name):
        raise UserError(f"{files[0]} is one part of several; join them first (llama.cpp has llama-gguf-split).")
    return files[0] if files else None


def place_of(name: Any) -> tuple[Any, dict[str, str]]:
    """Where a checkpoint lies, and its GGUF file's name, for transformers. Raises UserError without packages for it."""
    if (file := gguf_file(name)) is None:
        return resolve(name), {}
    if missing := [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]:
        raise UserError(f"Reading {file} needs {' and '.join(missing)}: install casa-vlm[gguf].")
    return str(file.parent), {"gguf_file": file.name}


def check_folder(name: Any, needed: str = "config.json", subfolder: str = "") -> None:
    """Refuses a local path that is no checkpoint. Names that may be a hub's are left to transformers."""
    path = Path(str(name))
    if path.is_dir():
        if not (path / subfolder / needed).is_file():
            raise UserError(f"{path / subfolder} has no {needed}; give the folder that save_pretrained wrote.")
        return
    if path.suffix == ".gguf" and path.is_file():
        raise UserError(f"{name} holds a language model without eyes; adapt it, and give the folder of the result.")
    if path.exists():
        raise UserError(f"{name} is a file; give the folder that save_pretrained wrote.")
    looks_local = str(name).startswith((".", "/", "~")) or str(name).count("/") != 1
    if looks_local:
        raise UserError(f"there is no model at {str(name)!r}; give a folder, or one of: {', '.join(shipped())}.")


def load_checked(load: Callable[..., Any], name: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a `from_pretrained` and refuses a checkpoint with missing, surplus or misshapen weights."""
    path = resolve(name)
    if (file := kwargs.get("gguf_file")) is None:
        check_folder(path)
    else:
        name = Path(str(path)) / file
    wanted = kwargs.pop("output_loading_info", False)
    kwargs.setdefault("use_safetensors", True)
    # so that weights of another shape come back by name; they are refused below
    kwargs["ignore_mismatched_sizes"] = True
    refuse_code(kwargs)
    try:
        model, info = load(path, *args, output_loading_info=True, **kwargs)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{name} cannot be loaded: {sentence_of(error)}") from error
    for kind, remedy in (
        ("missing_keys", "are missing from it"),
        ("unexpected_keys", "are in it and not in the model"),
        ("mismatched_keys", "have another shape in it"),
    ):
        # a misshapen weight comes with its two shapes
        if keys := sorted(key if isinstance(key, str) else str(key[0]) for key in info.get(kind) or ()):
            raise UserError(
                f"the weights in {name} do not fit this model: {len(keys)} {remedy}, the first is {keys[0]}; "
                "use a checkpoint saved with this configuration."
            )
    return (model, info) if wanted else model


def refuse_code(settings: dict[str, Any]) -> None:
    """Takes trust_remote_code out of what a `from_pretrained` was given. Raises UserError if it is true."""
    if settings.pop("trust_remote_code", False):
        raise UserError("casa runs no code from a checkpoint; leave out trust_remote_code.")


def find_file(name: Any, file: str, **hub: Any) -> Path | None:
    """A file of a checkpoint in a folder, or in a hub's cache or fetched into it; None if the checkpoint has none.

    Args:
        hub: Revision, subfolder, cache_dir and what else transformers' `from_pretrained` says of the place.

    Raises:
        OSError: The hub cannot be asked, and its cache does not tell either.
    """
    found = cached_file(str(resolve(name)), file, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(found)


def weight_files(name: Any, **hub: Any) -> list[Path]:
    """The safetensors files of a checkpoint, found like `find_file` does. Raises UserError if one is missing."""
    if (single := find_file(name, SAFE_WEIGHTS_NAME, **hub)) is not None:
        return [single]
    index = find_file(name, SAFE_WEIGHTS_INDEX_NAME, **hub)
    if index is None:
        if any(path.suffix in (".bin", ".pt", ".pth") for path in Path(str(name)).glob("*.*")):
            raise UserError(
                f"{name} holds its weights as pickles, which casa does not open; "
                "load them with transformers and save_pretrained them as safetensors first."
            )
        raise UserError(
            f"{name} has no {SAFE_WEIGHTS_NAME} nor an index of several; give the folder that save_pretrained wrote."
        )
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError):
        names = []
    # no file outside of the folder
    if not names or any(Path(file).name != file for file in names):
        raise UserError(f"{index} cannot be read; fetch it again.")
    found = []
    for file in names:
        if (path := find_file(name, file, **hub)) is None:
            raise UserError(f"{file} is missing in {name}; fetch it again.")
        found.append(path)
    return found


def read_text(file: Path) -> str:
    """The text in a file of a checkpoint. Raises UserError if there is none."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read; fetch it again.") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises UserError if it holds anything else."""
    try:
        read = json.loads(read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read; fetch it again.") from error
    if not isinstance(read, dict):
        raise UserError(f"{file} cannot be read; fetch it again.")
    return read


@contextmanager
def reading(name: Any, part: str) -> Iterator[None]:
    """Inside, whatever a library raises over the files of a model becomes a UserError; `part` is what they hold."""
    try:
        yield
    except UserError:
        raise
    # over a damaged tokenizer or template json, tokenizers and jinja2 raise what they like
    except Exception as error:
        said = sentence_of(error).rstrip(". ")
        raise UserError(
            f"{name} has no {part} that can be read ({said}): fetch its files again, or take another model."
        ) from error


def sentence_of(error: Exception) -> str:
    """The first line of an error's message, with the next one if it only introduces that; without one, its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def read_config(path: Any, **hub: Any) -> Any:
    """The transformers config in a folder, a JSON file or a hub's.

    Args:
        hub: Revision, subfolder and what else transformers' `from_pretrained` says of the place.

    Raises:
        UserError: It cannot be read.
    """
    path, told = place_of(path)
    hub |= told
    if not told and not Path(str(path)).is_file():
        check_folder(path, subfolder=hub.get("subfolder") or "")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **hub)
    except UNREADABLE as error:
        raise UserError(f"the config of {path} cannot be read: {sentence_of(error)}") from error
    return config


_BLOCK = 64
_ROWS = 32
# where a hub's config is looked for
WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def leave_odd_shapes(settings: Any, kind: Any, path: Any, given: Mapping[str, Any]) -> Any:
    """A `quantization_config` (or its values) that also names what 4 bits do not fit; other kinds stay as they are.

    Args:
        kind: The model's class.
        path, given: What else its `from_pretrained` was called with.
    """
    if isinstance(settings, dict):
        settings = AutoQuantizationConfig.from_dict(settings)
    if not getattr(settings, "load_in_4bit", False):
        return settings
    config = given.get("config")
    if not isinstance(config, PreTrainedConfig):
        there = {name: given[name] for name in WHERE if name in given}
        config = kind.config_class.from_pretrained(config or path, **there)
    with torch.device("meta"):
        # building a model writes into its config
        model = kind(copy.deepcopy(config))
    odd = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (module.in_features % _BLOCK or module.out_features % _ROWS)
    }
    settings = copy.deepcopy(settings)
    chosen = settings.llm_int8_skip_modules
    # transformers leaves the output and what is tied to it only where nothing is named
    settings.llm_int8_skip_modules = sorted(odd.union(get_keys_to_not_convert(model) if chosen is None else chosen))
    return settings
