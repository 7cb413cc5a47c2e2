"""Few new tokens, without the modules: the way on which generate, sessions, the engine and the server decode.

Shapes: B rows, L new tokens of each, S cached text tokens, d width, H query heads, Hkv key heads, D channels of a head.

A block's projections are joined once: queries, keys and values of self-attention and of the fusion layer beside it in
one product, both halves of the gated feed-forward network in one. The modules keep their weights: their parameters
become views of the joined matrix, so nothing is held twice, and what is trained or loaded into them counts here too.
Whatever takes the place of a parameter or a module, or is hooked to one, is noticed at the next token.

    parallel, own weights      values, keys, queries of the fusion layer | queries, keys, values of self-attention
    all others                 queries, keys, values of each
    feed-forward               gate | up

On a CPU one row goes through `mv` and a few through W x^T where torch's `linear` takes longer: it takes half as long
again on some machines, and two thirds on others (docs/performance.md).
What has to go through the modules is told by `PreparedDecoder.refusal`.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import repeat
from operator import contains, is_
from threading import Lock
from time import perf_counter
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casa.layers import CasaAttention, Rotary, Rotation, Step, is_its_weight, per_rotary
from casa.models.backbones import Decoder
from casa.models.cache import CasaCache, GrowingLayer
from casa.models.configuration_casa import FusionConfig
from casa.models.fusion import ReplacedSelfAttention, is_own_hook
from casa.models.int8 import Int8Linear, int8_product
from casa.models.replay import is_replayed

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
        elif not (x.is_cpu and x.shape[0] <= FEW and linear_is_slow(x.dtype, x.shape[0] > 1)):
            found = F.linear(x, weight, bias)
        elif x.shape[0] == 1:
            plus = bias if residual is None else residual[0] if bias is None else residual[0] + bias
            return (torch.mv(weight, x[0]) if plus is None else torch.addmv(plus, weight, x[0]))[None]
        else:
            # attention wants its heads' channels side by side
            found = torch.mm(weight, x.t()).t().contiguous()
            found = found if bias is None else found + bias
        return found if residual is None else found.add_(residual)

    def rows(self, start: int) -> "Matrix":
        """The same matrix from a row on."""
        found = copy.copy(self)
        found.scale = None if self.scale is None else self.scale[start:]
        found.weight, found.bias = self.weight[start:], None if self.bias is None else self.bias[start:]
        return found


@cache
def linear_is_slow(dtype: torch.dtype, several: bool) -> bool:
    """Whether `linear` takes longer on this CPU for one row, or for eight, than what stands in for it.

    Measured once a process in half precision, where machines differ, on more weights than a cache holds.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    weights, rows = torch.ones(24, 1536, 576, dtype=dtype), torch.ones(8 if several else 1, 576, dtype=dtype)

    def instead(weight: Tensor) -> Tensor:
        return torch.mm(weight, rows.t()).t().contiguous() if several else torch.mv(weight, rows[0])

    def seconds(way: Callable[[Tensor], Tensor]) -> float:
        begun = perf_counter()
        for weight in weights:
            way(weight)
        return perf_counter() - begun

    # in turns, so that other work slows both
    turns = [(seconds(instead), seconds(partial(F.linear, rows))) for _ in range(5)]
    ours, linear = map(min, zip(*turns, strict=True))
    return linear > ours


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
        rows: Of the projections to queries, keys and values; queries alone where text is not among the keys.
        counts: Heads of each.
    """

    def __init__(self, source: nn.Module, texts: bool = True) -> None:
        names = ("q_proj", "k_proj", "v_proj") if texts else ("q_proj",)
        self.inputs = [source.get_submodule(name) for name in names]
        self.output = Matrix(source.get_submodule("o_proj"))
        self.width = cast(int, source.head_dim)
        self.scale: float = getattr(source, "scaling", None) or self.width**-0.5
        self.rows = [cast(nn.Linear, module).out_features for module in self.inputs]
        self.counts = [rows // self.width for rows in self.rows]
        self.norms = [getattr(source, name, None) for name in ("q_norm", "k_norm")]

    def split(self, projected: Tensor, backwards: bool = False) -> list[Tensor]:
        """Queries (T, H, D), and keys and values (T, Hkv, D) if text is a key, from (T, rows).

        backwards: values stand first.
        """
        counts = self.counts[::-1] if backwards else self.counts
        heads = list(projected.view(projected.shape[0], -1, self.width).split(counts, dim=1))
        if backwards:
            heads.reverse()
        for number, norm in enumerate(self.norms[: len(heads)]):
            if norm is not None:
                heads[number] = norm(heads[number])
        return heads


@dataclass
class Call:
    """What all blocks share in one call.

    Attributes:
        step: What the fusion layers see; None without images.
        length: L.
        turns: Of every block's queries, keys and values; None where it has no rotary positions.
        mask: bool (B, 1, L, S + L), or (B * Hkv, 1, 1, S + 1) of one token: what new text sees of the cached text and
            itself; None if all of it.
        text: Keys and values of every block's text.
    """

    step: Step | None
    length: int
    turns: Sequence[Rotation | None]
    mask: Tensor | None
    text: Sequence[GrowingLayer]


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
        self.down, act = Matrix(get("mlp.down_proj")), cast(Any, get("mlp")).act_fn
        # in place, since nobody else looks at it
        self.act = partial(F.silu, inplace=True) if isinstance(act, nn.SiLU) else act
        before = cast(Heads, self.window) if self.is_joint else None
        # the fusion layer's in reverse, so that self-attention's are in their own order also alone
        ahead = [] if before is None else before.inputs[::-1]
        self.project = Matrix(*ahead, *self.text.inputs)
        self.start = 0 if before is None else sum(before.rows)  # of self-attention's
        self.alone = self.project.rows(self.start)
        own = self.window if layer is not None and not self.is_joint else None
        self.project_window = self.project if own is None else Matrix(*own.inputs)

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        """(B * L, d) -> (B * L, d)"""
        looks = call.step is not None and self.window is not None
        if looks and self.placement == "before":
            x = self._looked(x, self._window_heads(self.norms[0](x)), call)
        hidden = self.norms[0](x)
        if self.placement == "replace":
            x = self._looked(x, self._window_heads(hidden), call)
        elif looks and self.is_joint:
            both = self.project(hidden)
            x = self._attended(x, both[:, self.start :], call)
            x = self._looked(x, cast(Heads, self.window).split(both[:, : self.start], backwards=True), call)
        else:
            own = self.alone(hidden)
            x = self._attended(x, own, call)
            if looks and self.placement == "parallel":
                x = self._looked(x, self.text.split(own), call)
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, dim=-1)
        return self.down(self.act(gate).mul_(up), x)

    def _window_heads(self, hidden: Tensor) -> list[Tensor]:
        return cast(Heads, self.window).split(self.project_window(hidden))

    def _attended(self, x: Tensor, projected: Tensor, call: Call) -> Tensor:
        """The residual with self-attention over the text, the new tokens' keys and values with it."""
        text, turn, tokens = self.text, call.turns[self.index], x.shape[0]
        if text.norms == [None, None]:
            heads = projected.view(tokens, -1, text.width)
        else:
            heads = torch.cat(text.split(projected), dim=1)
        heads = heads if turn is None else turn(heads)
        queries, shared, _ = text.counts
        rows = tokens // call.length
        new = heads[:, queries:].view(rows, call.length, 2, shared, text.width).permute(2, 0, 3, 1, 4)
        keys, values = call.text[self.index].add(new)
        if call.length == 1:
            # the query heads of a key head are queries of one attention: no key is copied
            query = heads[:, :queries].reshape(rows * shared, 1, -1, text.width)
            keys, values = (held.view(-1, 1, *held.shape[2:]) for held in (keys, values))
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=call.mask, scale=text.scale)
            return text.output(out.view(tokens, -1), x)
        query = heads[:, :queries].unflatten(0, (rows, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=call.mask, scale=text.scale, enable_gqa=True
        )
        return text.output(out.transpose(1, 2).reshape(tokens, -1), x)

    def _looked(self, x: Tensor, heads: list[Tensor], call: Call) -> Tensor:
        """The residual with the fusion layer's update (see `casa_update`)."""
        step, window, tokens = cast(Step, call.step), cast(Heads, self.window), cast(Step, call.step).tokens
        if tokens is not None:
            heads = [part[tokens] for part in heads]
        query, key, value = (heads[0], None, None) if step.attend == "image" else heads
        out = step.attention(cast(int, self.number), query, key, value, window.scale).flatten(1)
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
        self.module, self.gain = module, cast(Tensor, module.weight)
        # Helium rounds once
        self.is_plain = type(module).__name__ in PLAIN_NORMS
        self.eps: float = cast(Any, module).variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        if not self.is_plain or x.shape[0] > 1 or not x.is_cpu or x.dtype == torch.float64:
            return cast(Any, self.module).forward(x)
        wide = x.float().view(-1)
        normed = x * (wide.dot(wide).item() / x.shape[1] + self.eps) ** -0.5
        return normed.mul_(self.gain)


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
            # blocks differ in them only where text is not among the keys of some
            self._heads = max((block.text.counts for block in self._blocks), key=len)
            # rotary positions that look at how far the text has come cannot be captured
            kind = getattr(decoder.stack.get_submodule("rotary_emb"), "rope_type", "")
            self._is_steady = kind != "longrope" and "dynamic" not in kind
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
        length = embeds.shape[1]
        if length == 1 and self._is_steady and is_replayed(embeds):
            through = partial(self._through, rotaries)
            found = cache.replays.token(through, self, embeds, positions, mask, cache, step)
            if found is not None:
                return found
        seen = None if mask is None else mask[:, None, None]
        if length > 1:
            held = cache.text.get_seq_length() if mask is None else mask.shape[1] - length
            causal = torch.ones(length, held + length, dtype=torch.bool, device=embeds.device).tril(held)
            # padding sees itself, which is better than nothing
            itself = torch.eye(length, held + length, dtype=torch.bool, device=embeds.device).roll(held, 1)
            seen = causal if seen is None else (causal & seen) | itself
        return self._through(rotaries, embeds, positions, seen, cast(list[GrowingLayer], cache.text.layers), step)

    def _through(
        self,
        rotaries: Sequence[Rotary | None],
        embeds: Tensor,
        positions: Tensor,
        seen: Tensor | None,
        text: Sequence[Any],
        step: Step | None,
    ) -> Tensor:
        """The stack's output (B, L, d). seen: (B, 1, L or 1, keys), bool or a bias. text: of every block."""
        rows, length = embeds.shape[:2]
        queries, shared = [*self._heads, 0][:2]
        where = positions.flatten()
        turns = per_rotary(rotaries, lambda rotary: rotary(where).beside(queries + shared, shared))
        if length == 1 and seen is not None:
            seen = seen.repeat_interleave(shared, 0)
        call = Call(step, length, turns, seen, text)
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
        parts = [
            (held, name, part)
            for owner in self._owners
            for held in (owner["_modules"], owner["_parameters"], owner["_buffers"])
            for name, part in held.items()
        ]
        self._held, self._names, self._parts = zip(*parts, strict=True)
        self._tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._places = list(map(Tensor.data_ptr, self._tensors))
        self._count = self._counted()

    def _counted(self) -> tuple[int, ...]:
        compiled = map(dict.get, self._owners, repeat("_compiled_call_impl"))
        return sum(map(len, self._hooks)), sum(map(contains, self._owners, repeat("forward"))), sum(map(bool, compiled))

    @property
    def is_unchanged(self) -> bool:
        # of a thousand parts, at every token: no loop in Python
        return (
            self._counted() == self._count
            and all(map(is_, map(dict.get, self._held, self._names), self._parts))
            and list(map(Tensor.data_ptr, self._tensors)) == self._places
        )


HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # those of the backward pass do nothing with gradients off
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
    # two dimensions: of three, torch would multiply a last token alone as a batch, and copy the whole head for it
    each = hidden.flatten(0, 1)
    elsewhere = torch.is_grad_enabled() or torch.compiler.is_compiling() or is_autocast()
    if not (goes_on and whole) or each.shape[0] > FEW or elsewhere:
        return decoder.logits(each).unflatten(0, hidden.shape[:2])
    return Matrix(head)(each).unflatten(0, hidden.shape[:2])


def is_autocast() -> bool:
    """Whether products choose their dtype by themselves."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
