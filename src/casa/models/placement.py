"""Weights that are elsewhere: modules that accelerate keeps on disk or in host memory until they are called.

A CASA layer's modules are called as usual, so nothing is to be done for them. The gains of the blocks' norms are
read without a call, to be folded into projections, and have to be fetched for that.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from casa.errors import UserError


@contextmanager
def fetched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the modules' own weights can be read, wherever they are kept."""
    kept: list[tuple[nn.Module, Any]] = [(m, m._hf_hook) for m in modules if hasattr(m, "_hf_hook")]
    for module, hook in kept:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in kept:
            hook.post_forward(module, None)


def check_one_device(layers: Iterable[nn.Module]) -> None:
    """Raises UserError if layers that share image keys, values and a window state run on several devices."""
    found = {p.device for layer in layers for p in layer.parameters() if p.device.type != "meta"}
    if len(found) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise UserError(
            f"the fusion layers stand on several devices ({names}); "
            "give a device_map that keeps backbone and casa_layers on one, or on one and on disk."
        )
