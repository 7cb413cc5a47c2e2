"""Image encoders and the projector that brings their tokens to the text model."""

from casa.vision.encoder import encode, output_width, token_grids
from casa.vision.projector import PLACE_WIDTH, Projector, place_features

__all__ = ["PLACE_WIDTH", "Projector", "encode", "output_width", "place_features", "token_grids"]
