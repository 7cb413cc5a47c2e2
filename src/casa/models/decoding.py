"""Few new tokens, without the modules: the way on which generate, sessions, the engine and the server decode.

Shapes: B rows, L new tokens of each, S cached text tokens, d width, H query heads, Hkv key heads, D channels of a head.

A block's projections are joined once: queries, keys and values of self-attention and of the fusion layer beside it in
one product, both halves of the gated feed-forward network in one. The modules keep their weights: their parameters
become views of the joined matrix, so nothing is held twice, and what is trained or loaded into them counts here too.
Whatever takes the place of a parameter or a module, or is hooked to one, is noticed at the next token.

    parallel, own weights      values, keys, queries of the fusion layer | queries, keys, values of self-attention
    all others                 queries, keys, values of each
    feed-forward               gate | up

On a CPU one row goes through `mv` and a few through W x^T: `linear` takes half as long again (docs/performance.md).
What has to go through the modules is told by `PreparedDecoder.refusal`.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casa.layers import CasaAttention, Rotary, Step, is_its_weight
from casa.models.backbones import Decoder
from casa.models.cache import CasaCache, GrowingLayer
from casa.models.configuration_casa import FusionConfig
from casa.models.fusion import ReplacedSelfAttention, is_own_hook
from casa.models.int8 import Int8Linear, int8_product

# blocks of transformers that are x + attention(norm(x)), then x + feed-forward(norm(x))
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Helium", "Qwen2VL", "Qwen2_5_VL", "Qwen3VLText")
PLAIN_NORMS = frozenset(f"{family}RMSNorm" for family in FAMILIES) - {"HeliumRMSNorm"}
Layers = Sequence[CasaAttention | None]
FEW = 32  # rows up to which reading a matrix takes longer than multiplying it


class Matrix:
    """The projections of linear modules side by side: (B, K) -> (B, N)."""

    def __init__(self, *modules: nn.Module) -> None:
        linear = [cast(nn.Linear, module) for module in modules]
        self.weight = joined([module.weight for module in linear])
        is_int8 = isinstance(modules[0], Int8Linear)
        self.scale = joined([cast(Int8Linear, module).scale for module in modules]) if is_int8 else None
        biases = [module.bias for module in linear if module.bias is not None]
        self.bias = joined(biases) if biases else None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """What is found, with the residual (B, N) added if there is one."""
        weight, bias = self.weight, self.bias
        if self.scale is not None:
            found = int8_product(x, weight, self.scale, bias)
        elif len(x) == 1 and x.device.type == "cpu":
            plus = bias if residual is None else residual[0] if bias is None else residual[0] + bias
            return (torch.mv(weight, x[0]) if plus is None else torch.addmv(plus, weight, x[0]))[None]
        elif len(x) <= FEW and x.device.type == "cpu":
            # attention wants its heads' channels side by side
            found = torch.mm(weight, x.t()).t().contiguous()
            found = found if bias is None else found + bias
        else:
            found = F.linear(x, weight, bias)
        return found if residual is None else residual + found

    def rows(self, start: int) -> "Matrix":
        """The same matrix from a row on."""
        found = copy.copy(self)
        found.scale = None if self.scale is None else self.scale[start:]
        found.weight, found.bias = self.weight[start:], None if self.bias is None else self.bias[start:]
        return found


def joined(parts: Sequence[Tensor]) -> Tensor:
    """A tensor of whose rows all `parts` are views from now on. Copies nothing where they are already."""
    first, at = parts[0], parts[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != at or part.untyped_storage().data_ptr() != storage or not part.is_contiguous():
            break
        at += part.numel() * part.element_size()
    else:
        return first.detach().as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    # what was made in inference mode may be nothing else, and what was not must be trainable
    with torch.inference_mode(first.is_inference()), torch.no_grad():
        whole = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = view
    return whole


class Heads:
    """One attention of a block: from what is projected to heads, and back.

    Args:
        source: The attention module.
        texts: Whether text is among its keys.

    Attributes:
        rows: Of the projections to queries, keys and values.
    """

    def __init__(self, source: nn.Module, texts: bool = True) -> None:
        self.source = source
        names = ("q_proj", "k_proj", "v_proj") if texts else ("q_proj",)
        self.inputs = [source.get_submodule(name) for name in names]
        self.output = Matrix(source.get_submodule("o_proj"))
        self.width = cast(int, source.head_dim)
        self.scale: float = getattr(source, "scaling", None) or self.width**-0.5
        self.rows = [cast(nn.Linear, module).out_features for module in self.inputs]
        self.norms = [getattr(source, name, None) for name in ("q_norm", "k_norm")]

    def split(self, projected: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Queries (B, H, D), and keys and values (B, Hkv, D) if text is a key, from (B, rows) each."""
        heads: list[Tensor | None] = [x.unflatten(-1, (-1, self.width)) for x in projected]
        for number, norm in enumerate(self.norms[: len(heads)]):
            if norm is not None:
                heads[number] = norm(heads[number])
        query, key, value = heads if len(heads) == 3 else (*heads, None, None)
        assert query is not None
        return query, key, value


@dataclass
class Call:
    """What all blocks share in one call.

    Attributes:
        cache: Text and windows so far.
        step: What the fusion layers see; None without images.
        length: L.
        turns: Of every block, None where it has no rotary positions.
        mask: bool (B, 1, 1 or L, S + L), what new text sees of the cached text and itself; None if all of it.
    """

    cache: CasaCache
    step: Step | None
    length: int
    turns: "list[Turn | None]"
    mask: Tensor | None


class Block:
    """A block's weights. number: of its fusion layer; None if it has none."""

    def __init__(
        self, block: nn.Module, index: int, number: int | None, layer: CasaAttention | None, fusion: FusionConfig
    ):
        get = block.get_submodule
        self.index, self.number, self.gate = index, number, None if layer is None else layer.gate
        self.placement = fusion.placement if number is not None else ""
        self.norms = Norm(get("input_layernorm")), Norm(get("post_attention_layernorm"))
        self.text = Heads(get("self_attn"), fusion.attend != "image" or self.placement != "replace")
        self.window = None if number is None else self.text if layer is None else Heads(layer, fusion.attend != "image")
        self.is_joint = layer is not None and self.placement == "parallel"
        self.gate_up = Matrix(get("mlp.gate_proj"), get("mlp.up_proj"))
        self.down, self.act = Matrix(get("mlp.down_proj")), cast(Any, get("mlp")).act_fn
        before = cast(Heads, self.window) if self.is_joint else None
        # the fusion layer's in reverse, so that self-attention's are in their own order also alone
        ahead = [] if before is None else before.inputs[::-1]
        self.project = Matrix(*ahead, *self.text.inputs)
        self.rows = [cast(nn.Linear, module).out_features for module in (*ahead, *self.text.inputs)]
        self.alone = self.project if before is None else self.project.rows(sum(before.rows))
        own = self.window if layer is not None and not self.is_joint else None
        self.project_window = self.project if own is None else Matrix(*own.inputs)

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        """(B, d) -> (B, d)"""
        looks = call.step is not None and self.window is not None
        if looks and self.placement == "before":
            x = self._looked(x, self._window_heads(self.norms[0](x)), call)
        hidden = self.norms[0](x)
        if self.placement == "replace":
            x = self._looked(x, self._window_heads(hidden), call)
        else:
            both = looks and self.placement == "parallel"
            if both and self.is_joint:
                parts = self.project(hidden).split(self.rows, dim=-1)
                parts, mine = parts[-3:], parts[-4::-1]
                window = cast(Heads, self.window).split(mine)
            else:
                parts = self.alone(hidden).split(self.text.rows, dim=-1)
                window = None
            query, key, value = self.text.split(parts)
            x = self.text.output(self._attended(query, cast(Tensor, key), cast(Tensor, value), call), x)
            if both:
                x = self._looked(x, (query, key, value) if window is None else window, call)
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, dim=-1)
        return self.down(self.act(gate) * up, x)

    def _window_heads(self, hidden: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        window = cast(Heads, self.window)
        return window.split(self.project_window(hidden).split(window.rows, dim=-1))

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        """(B, H * D): self-attention over the text, the new token's key and value with it."""
        if (turn := call.turns[self.index]) is not None:
            query, key = turn(query), turn(key)
        layer = cast(GrowingLayer, call.cache.text.layers[self.index])
        if call.length == 1:
            keys, values = layer.update(key[:, :, None], value[:, :, None])
            # the query heads of a key head are queries of one attention: no key is copied
            query = query.unflatten(1, (key.shape[1], -1))
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=call.mask, scale=self.text.scale)
            return out.flatten(1)
        query, key, value = (x.unflatten(0, (-1, call.length)).transpose(1, 2) for x in (query, key, value))
        keys, values = layer.update(key, value)
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=call.mask, scale=self.text.scale, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def _looked(self, x: Tensor, heads: tuple[Tensor, Tensor | None, Tensor | None], call: Call) -> Tensor:
        """The residual with the fusion layer's update (see `casa_update`)."""
        step, window, tokens = cast(Step, call.step), cast(Heads, self.window), cast(Step, call.step).tokens
        if step.attend == "image":
            heads = heads[0], None, None
        if tokens is not None:
            query, key, value = heads
            heads = query[tokens], None if key is None else key[tokens], None if value is None else value[tokens]
        out = step.attention(cast(int, self.number), *heads, window.scale).flatten(1)
        sees = None if self.placement == "replace" and step.attend != "image" else step.sees_image
        if sees is None and self.gate is None and tokens is None:
            return window.output(out, x)
        update = window.output(out)
        if self.gate is not None:
            update = update * self.gate.tanh().to(update.dtype)
        if sees is not None:
            update = torch.where(sees[:, None], update, update.new_zeros(()))
        return x + update if tokens is None else x.index_add(0, tokens, update)


class Norm:
    """A root mean square norm (B, d). One row on a CPU takes half the module's steps, with the same roundings."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # Helium rounds once
        self.is_plain = type(module).__name__ in PLAIN_NORMS

    def __call__(self, x: Tensor) -> Tensor:
        module = cast(Any, self.module)
        if not self.is_plain or len(x) > 1 or x.device.type != "cpu" or x.dtype == torch.float64:
            return module.forward(x)
        wide = x[0].float()
        factor = (float(wide.dot(wide)) / len(wide) + module.variance_epsilon) ** -0.5
        return (module.weight * (wide * factor).to(x.dtype))[None]


class Turn:
    """A rotation of one token per row, with the signs in the sines: `Rotation` in fewer steps."""

    def __init__(self, rotary: Rotary, positions: Tensor) -> None:
        found = rotary(positions)
        sin, self.neighbours = found.sin[:, None], found.neighbours
        if self.neighbours:
            signs = sin.new_tensor([-1.0, 1.0]).repeat(sin.shape[-1] // 2)
        else:
            self.half = sin.shape[-1] // 2
            signs = sin.new_ones(sin.shape[-1])
            signs[: self.half] = -1.0
        self.cos, self.sin = found.cos[:, None], sin * signs

    def __call__(self, x: Tensor) -> Tensor:
        """Turns x (B, H, D)."""
        across = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if self.neighbours else x.roll(self.half, -1)
        return torch.addcmul(x * self.cos, across, self.sin)


class PreparedDecoder:
    """A text model's blocks and their fusion layers, as a token goes through them.

    Args:
        decoder: The text model.
        fusion: How it is fused.
        chosen: Blocks with a fusion layer.
        layers: These layers, None where one borrows the block's weights.

    Attributes:
        refusal: What has to go through the modules, as a sentence; None if all is prepared.
    """

    def __init__(self, decoder: Decoder, fusion: FusionConfig, chosen: Sequence[int], layers: Layers):
        self._made_of = (fusion.placement, tuple(chosen), tuple(map(id, layers)))
        self._watch = Watch(decoder.stack, [layer for layer in layers if layer is not None])
        self.refusal = refusal(decoder, layers)
        if self.refusal is None:
            number = {block: at for at, block in enumerate(chosen)}
            self._blocks = [
                Block(block, index, at := number.get(index), None if at is None else layers[at], fusion)
                for index, block in enumerate(decoder.blocks)
            ]
            self._norm = Norm(decoder.stack.get_submodule("norm"))
            # joining has moved them
            self._watch.note()

    def fits(self, fusion: FusionConfig, chosen: Sequence[int], layers: Layers) -> bool:
        """Whether it is of these layers, and nothing has been put in the place of anything since."""
        return self._made_of == (fusion.placement, tuple(chosen), tuple(map(id, layers))) and self._watch.is_unchanged

    def __call__(
        self,
        embeds: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        rotaries: Sequence[Rotary | None],
        cache: CasaCache,
        step: Step | None,
    ) -> Tensor:
        """The stack's output (B, L, d) for the embeddings (B, L, d) of text at `positions` (B, L).

        mask: bool (B, S + L), the cached text and the new; None if all is real. rotaries: of every block.
        """
        rows, length = embeds.shape[:2]
        made: dict[int, Turn] = {}
        for rotary in rotaries:
            if rotary is not None and id(rotary) not in made:
                made[id(rotary)] = Turn(rotary, positions.flatten())
        turns = [None if rotary is None else made[id(rotary)] for rotary in rotaries]
        seen = None if mask is None else mask[:, None, None]
        if length > 1:
            held = cache.num_text
            causal = torch.ones(length, held + length, dtype=torch.bool, device=embeds.device).tril(held)
            # padding sees itself, which is better than nothing
            itself = torch.eye(length, held + length, dtype=torch.bool, device=embeds.device).roll(held, 1)
            seen = causal if seen is None else (causal & seen) | itself
        call = Call(cache, step, length, turns, seen)
        x = embeds.flatten(0, 1)
        for block in self._blocks:
            x = block(x, call)
        return self._norm(x).unflatten(0, (rows, length))


class Watch:
    """Notices what takes the place of a module or parameter below `roots`, or is hooked to one."""

    def __init__(self, stack: nn.Module, layers: Iterable[nn.Module]) -> None:
        self._modules = [module for root in (*stack.children(), *layers) for module in root.modules()]
        # of the stack itself its dictionaries alone: who keeps this by the stack must not keep the stack alive
        owners = [vars(module) for module in (stack, *self._modules)]
        self._hooks = [owner[name] for owner in owners for name in HOOKS]
        self._owners = owners
        self.note()

    def note(self) -> None:
        """Takes what is there now as it should be."""
        self._parts = [
            (held, name, part)
            for owner in self._owners
            for held in (owner["_modules"], owner["_parameters"], owner["_buffers"])
            for name, part in held.items()
        ]
        tensors = [part for _, _, part in self._parts if isinstance(part, Tensor)]
        self._places = [(tensor, tensor.data_ptr()) for tensor in tensors]
        self._count = self._counted()

    def _counted(self) -> tuple[int, int]:
        return sum(map(len, self._hooks)), sum(map(has_own_forward, self._owners))

    @property
    def is_unchanged(self) -> bool:
        return (
            self._counted() == self._count
            and all(held.get(name) is part for held, name, part in self._parts)
            and all(tensor.data_ptr() == place for tensor, place in self._places)
        )


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def has_own_forward(state: Mapping[str, Any]) -> bool:
    """Whether a module, given by its attributes, does something else when called than its class says."""
    return "forward" in state or state.get("_compiled_call_impl") is not None


def refusal(decoder: Decoder, layers: Layers) -> str | None:
    """Why a token has to go through the modules, if it has to."""
    if decoder.stack.config._attn_implementation != "sdpa":  # type: ignore[union-attr]
        return "attention goes another way than through torch"
    blocks, own = list(decoder.blocks), [layer for layer in layers if layer is not None]
    for block in blocks:
        for part in (block, block.self_attn):
            kind = type(part).__mro__[2 if isinstance(part, ReplacedSelfAttention) else 0]
            family = kind.__name__.removesuffix("DecoderLayer").removesuffix("Attention")
            if family not in FAMILIES or not kind.__module__.startswith("transformers.models."):
                return f"{kind.__name__} is not known"
    places = [decoder.stack, decoder.stack.get_submodule("norm")]
    for module in (*places, *(module for root in (*blocks, *own) for module in root.modules())):
        state = vars(module)
        if has_own_forward(state):
            return f"a {type(module).__name__} has a forward of its own"
        if any(not is_own_hook(hook) for name in HOOKS for hook in state[name].values()):
            return f"something is hooked to a {type(module).__name__}"
    pairs = [(block, (*(f"self_attn.{name}" for name in ATTENTION), *FEED_FORWARD)) for block in blocks]
    pairs += [(layer, ATTENTION) for layer in own]
    linear = [(name, root.get_submodule(name)) for root, names in pairs for name in names]
    for name, module in linear:
        whole = type(module) is Int8Linear or is_its_weight(module)
        if not whole or type(module.weight.data) is not Tensor or module.weight.is_meta:
            return f"{name} is more than its weight: a {type(module).__name__}"
    for alike in (ATTENTION[:3], FEED_FORWARD[:2]):
        if len({module.bias is None for name, module in linear if name.endswith(alike)}) > 1:
            return f"some of {', '.join(alike)} have a bias and some have none"
    if len({(module.weight.dtype, module.weight.device) for _, module in linear}) > 1:
        return "weights differ in dtype or device"
    return None


_prepared: WeakKeyDictionary[nn.Module, PreparedDecoder] = WeakKeyDictionary()
_preparing = Lock()


def prepared(decoder: Decoder, fusion: FusionConfig, chosen: Sequence[int], layers: Layers) -> PreparedDecoder:
    """The text model with fusion `layers` at the blocks `chosen`, prepared, anew where something has changed."""
    with _preparing:
        found = _prepared.get(decoder.stack)
        if found is None or not found.fits(fusion, chosen, layers):
            found = _prepared[decoder.stack] = PreparedDecoder(decoder, fusion, chosen, layers)
        return found


def short_logits(decoder: Decoder, hidden: Tensor, goes_on: bool) -> Tensor:
    """(B, L, V) from the stack's output (B, L, d); by `Matrix` for few tokens that go on in a text."""
    head: Any = decoder.model.get_output_embeddings()  # type: ignore[operator]
    whole = type(decoder).logits is Decoder.logits and is_its_weight(head) and type(head.weight.data) is Tensor
    if not (goes_on and whole) or hidden.shape[0] * hidden.shape[1] > FEW or torch.is_grad_enabled() or is_autocast():
        return decoder.logits(hidden)
    return Matrix(head)(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


def is_autocast() -> bool:
    """Whether products choose their dtype by themselves."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
