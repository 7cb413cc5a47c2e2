"""CASA layers over a block's self-attention, their image keys and values, and their state between calls."""

from casa.layers.ablation import Ablation
from casa.layers.casa import (
    IMAGE_PROJECTIONS,
    CasaAttention,
    ImageNorm,
    casa_update,
    is_its_weight,
    project_images,
    rms_norm,
)
from casa.layers.plan import CallPlan, images_by_row, plan_call
from casa.layers.state import LayerWindow, WindowExtent, WindowState
from casa.layers.step import AttentionRecorder, DecodeStep, PackedStep, Rotary, Rotation, Step, Turner, per_rotary

__all__ = [
    "IMAGE_PROJECTIONS",
    "Ablation",
    "AttentionRecorder",
    "CallPlan",
    "CasaAttention",
    "DecodeStep",
    "ImageNorm",
    "LayerWindow",
    "PackedStep",
    "Rotary",
    "Rotation",
    "Step",
    "Turner",
    "WindowExtent",
    "WindowState",
    "casa_update",
    "images_by_row",
    "is_its_weight",
    "per_rotary",
    "plan_call",
    "project_images",
    "rms_norm",
]
