"""CASA layers over a block's self-attention, their image keys and values, and their state between calls."""

from casa.layers.casa import CasaAttention, casa_update
from casa.layers.image_kv import ImageNorm, normalise, project_images
from casa.layers.plan import Plan, images_by_row, plan_call
from casa.layers.rotary import Rotary, Rotation, turner
from casa.layers.state import LayerWindow, WindowExtent, WindowState
from casa.layers.step import DecodeStep, PackedStep, Record, Step

__all__ = [
    "CasaAttention",
    "DecodeStep",
    "ImageNorm",
    "LayerWindow",
    "PackedStep",
    "Plan",
    "Record",
    "Rotary",
    "Rotation",
    "Step",
    "WindowExtent",
    "WindowState",
    "casa_update",
    "images_by_row",
    "normalise",
    "plan_call",
    "project_images",
    "turner",
]
