"""Image encoders behind one protocol, what brings their tokens to the text model, and token compressors."""

from casa.vision.compress import make_compressor, parse_compressor
from casa.vision.encoder import (
    Grids,
    encode,
    encoder_class,
    extra_depths,
    family_of,
    is_known,
    kind_of,
    load_encoder,
    new_encoder,
    output_width,
    token_grids,
    tower_config_of,
)
from casa.vision.encoders import Family, register_encoder
from casa.vision.projector import PLACE_WIDTH, Projector, place_features

__all__ = [
    "PLACE_WIDTH",
    "Family",
    "Grids",
    "Projector",
    "encode",
    "encoder_class",
    "extra_depths",
    "family_of",
    "is_known",
    "kind_of",
    "load_encoder",
    "make_compressor",
    "new_encoder",
    "output_width",
    "parse_compressor",
    "place_features",
    "register_encoder",
    "token_grids",
    "tower_config_of",
]
