"""Shapes of published models, written down so that their costs can be worked out without their weights.

Qwen's are those of the published config.json files. Helium's config.json was not at hand: its numbers are checked
from two sides, by the parameter count that its model card states (a test works it out from these shapes) and by the
KV memory that the paper's streaming table gives Helium1-VL-2B (section 5, 28 GiB for 262,144 tokens: 112 KiB a token),
which is that of 28 blocks of 8 key heads of 128 channels in bf16. helium-2b is kyutai/helium-1-2b, the paper's
text-only backbone (2,023,868,416 parameters), helium-2b-preview kyutai/helium-1-preview-2b, with as many key heads as
query heads (2,172,643,840), the others Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct.
"""

import copy
import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from casa.errors import UserError
from casa.models import CasaConfig
from casa.models.adapt import has_own_tower
from casa.models.loading import read_config
from casa.vision import tower_config_of

SHAPES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
TOWER_OF = "qwen2_5-vl-3b"  # whose image encoder a text-only model gets if nothing is said (paper, section 4)


def published_config(name: str) -> Any:
    """The transformers config of a shape of `SHAPES`; UserError for any other name."""
    if name not in SHAPES:
        raise UserError(f"there is no shape {name!r}; the known ones are: {', '.join(SHAPES)}.")
    values = copy.deepcopy(SHAPES[name])
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def shapes_of(backbone: Any, vision: Any = None, *, published: bool = False) -> tuple[Any, Any]:
    """The configs of a backbone and of the image encoder it is to get; the latter is None if it has one of its own.

    Args:
        backbone: A folder, a config.json, or, if `published`, the name of a shape. A model of casa's own stands for its
            backbone and its encoder.
        vision: A folder or config.json of an encoder or of a model that has one; the tower of Qwen2.5-VL-3B if left
            out.
        published: The backbone is one of `SHAPES`.

    Raises:
        UserError: Something cannot be read or is not known, or a VLM has no use for a tower.
    """
    config = published_config(backbone) if published else read_config(backbone)
    if isinstance(config, CasaConfig):
        # what it was made of, to be given every method in turn
        return config.text_config, config.vision_config
    if has_own_tower(config):
        if vision is not None:
            raise UserError("this backbone has an image encoder of its own; leave out vision.")
        return config, None
    tower = published_config(TOWER_OF).vision_config if vision is None else tower_config_of(read_config(vision))
    return config, tower
