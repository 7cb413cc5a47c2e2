"""Image encoders behind one protocol, what brings their tokens to the text model, and token compressors."""

from casa.vision import page_encoder, towers  # noqa: F401 (both register what they know)
from casa.vision.connector import (
    PLACE_WIDTH,
    PROJECTORS,
    AveragePool,
    PixelShuffle,
    QFormer,
    make_compressor,
    parse_compressor,
    place_features,
)
from casa.vision.encoder import (
    EncoderSpec,
    Grids,
    encode,
    encoder_class,
    extra_depths,
    is_known,
    kind_of,
    load_encoder,
    new_encoder,
    output_width,
    register_encoder,
    spec_of,
    token_grids,
    tower_config_of,
)

__all__ = [
    "PLACE_WIDTH",
    "PROJECTORS",
    "AveragePool",
    "EncoderSpec",
    "Grids",
    "PixelShuffle",
    "QFormer",
    "encode",
    "encoder_class",
    "extra_depths",
    "is_known",
    "kind_of",
    "load_encoder",
    "make_compressor",
    "new_encoder",
    "output_width",
    "parse_compressor",
    "place_features",
    "register_encoder",
    "spec_of",
    "token_grids",
    "tower_config_of",
]
