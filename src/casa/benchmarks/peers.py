"""Side by side with what users would pick: one backbone, one image encoder, one film, in one run.

    insertion            transformers' SmolVLM: SigLIP, pixel shuffle, image tokens in the text's cache
    sinks and window     the same model as streaming-vlm runs it: the first text tokens, the last text tokens and the
                         last frames stay cached, and what stays moves together (contiguous rotary positions)
    cross-attention      transformers' Mllama: blocks of their own look at all frames so far
    CASA                 every n-th block, and every block

In a published shape (`shape`) they are CASA in every block and insertion through this library, as the official release
compares them.

Shapes: N image tokens of a frame, L text tokens of a call, d width; one row. Weights are random (but the backbone's,
where one is named): what is told is cost, not what is said. A turn is a frame, whose pixels are encoded, and the tokens
said of it. Of the turns between the measured ones, caches get what they would hold: noise, which costs as much.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, MllamaForCausalLM, SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from casa.benchmarks.decode import ALL, DTYPES, EVERY, small_backbone
from casa.benchmarks.harness import Benchmark, Figures, Panel, clock, table
from casa.benchmarks.settings import PeersSettings
from casa.benchmarks.train import fresh_model, random_picture
from casa.layers import Rotation
from casa.models import FusionConfig, adapt
from casa.models.auto import pick_device
from casa.models.cache import CACHE

# SmolVLM-256M's: SigLIP of base size at 512 px; a token is 4 x 4 patches
TOWER: dict[str, Any] = {"hidden_size": 768, "num_attention_heads": 12, "image_size": 512, "patch_size": 16}
SHUFFLE = 4
PROMPT = 64  # text tokens before the first frame
INSERTION, WINDOW, CROSS = "insertion", "sinks and window", "cross-attention"


class PeerTurn(NamedTuple):
    """Seconds for the encoder, from the pixels to the first token, and of each token after it; bytes of the cache."""

    encode: float
    first: float
    token: float
    held: int


class Peer:
    """A model and what it holds of one film.

    Args:
        model: Any that has transformers' cache.
        encode: Makes of a frame's pixels the features that `call` takes.
        beside: Modules that do so and are no part of the model.
    """

    def __init__(self, model: Any, encode: Callable[[Tensor], Tensor], *beside: nn.Module) -> None:
        self.model, self.encode, self.beside = model, encode, beside
        self.cache: Any = None

    def call(self, ids: Tensor, features: Tensor | None = None) -> Tensor:
        """The likeliest token (1, 1) behind `ids` (1, L), which stand behind a frame's `features` if there are any."""
        inputs = self.inputs(ids, features)
        output = self.model(**{CACHE: self.cache}, use_cache=True, logits_to_keep=1, **inputs)
        self.cache = output[CACHE]
        return output.logits[:, -1].argmax(-1, keepdim=True)

    def inputs(self, ids: Tensor, features: Tensor | None) -> dict[str, Tensor]:
        raise NotImplementedError

    def begin(self, prompt: Tensor) -> None:
        """Forgets the film; a text (1, L) stands before the next one."""
        self.cache = DynamicCache()
        self.call(prompt)

    def end_turn(self) -> None:
        """Called when all of a turn is said."""

    def skip(self, turns: int, said: Tensor, features: Tensor) -> None:
        """Has the cache hold so many further turns, of tokens `said` (1, L) and a frame's `features` each."""
        self.fill(turns * said.shape[1])

    def fill(self, text: int, images: int = 0, every: int = 0) -> None:
        """Puts noise of `text` tokens into the cache; of `images` into each layer behind `every` others, if given."""
        for index, layer in enumerate(self.cache.layers):
            length = images if every and index % (every + 1) == every else text
            self.cache.update(*(torch.randn_like(layer.keys[:, :, :1].expand(-1, -1, length, -1)) for _ in "kv"), index)

    @property
    def held(self) -> int:
        """Bytes of keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers if layer.is_initialized)

    @property
    def weights(self) -> int:
        """Bytes of all weights, the encoder's among them."""
        return sum(parameter.nbytes for module in (self.model, *self.beside) for parameter in module.parameters())


class Inserted(Peer):
    """Image tokens in the text's cache. Embeddings are merged before the call, as the model itself does."""

    def inputs(self, ids: Tensor, features: Tensor | None) -> dict[str, Tensor]:
        embeds = self.model.get_input_embeddings()(ids)
        return {"inputs_embeds": embeds if features is None else torch.cat([features[None], embeds], dim=1)}

    def skip(self, turns: int, said: Tensor, features: Tensor) -> None:
        self.fill(turns * (said.shape[1] + len(features)))


class Windowed(Inserted):
    """Insertion that forgets: cached are `sinks` first text tokens, `texts` last ones, and the last `frames`."""

    def __init__(self, model: Any, encode: Callable[[Tensor], Tensor], sinks: int, texts: int, frames: int) -> None:
        super().__init__(model, encode)
        self.sinks, self.texts, self.frames = sinks, texts, frames

    def begin(self, prompt: Tensor) -> None:
        self._frame_of = torch.zeros(0, dtype=torch.int64)  # of every cached token: its frame from 1 on; 0: text
        self._seen = 0
        super().begin(prompt)

    def inputs(self, ids: Tensor, features: Tensor | None) -> dict[str, Tensor]:
        self._note(ids, features)
        return super().inputs(ids, features)

    def _note(self, ids: Tensor, features: Tensor | None) -> None:
        if features is not None:
            self._seen += 1
            self._frame_of = torch.cat([self._frame_of, torch.full((len(features),), self._seen)])
        self._frame_of = torch.cat([self._frame_of, torch.zeros(ids.shape[1], dtype=torch.int64)])

    def skip(self, turns: int, said: Tensor, features: Tensor) -> None:
        super().skip(turns, said, features)
        for _ in range(turns):
            self._note(said, features)
        self.end_turn()

    def end_turn(self) -> None:
        is_text = self._frame_of == 0
        number = is_text.cumsum(0)  # of a text token, from 1 on
        near = is_text & ((number <= self.sinks) | (number > number[-1] - self.texts))
        kept = (near | (self._frame_of > max(self._seen - self.frames, 0))).nonzero().flatten()
        if len(kept) < len(self._frame_of):
            self._frame_of = self._frame_of[kept]
            move(self.cache, kept, self.model.model.text_model.rotary_emb)


def move(cache: DynamicCache, kept: Tensor, turn: nn.Module) -> None:
    """Leaves some cached tokens side by side, each key turned to its new position.

    Args:
        cache: Of one row; changed in place.
        kept: int64 (n,), rising.
        turn: The text model's rotary embedding.
    """
    layers = cast(list[Any], cache.layers)
    device = layers[0].keys.device
    kept = kept.to(device)
    cos, sin = turn(torch.zeros(1, device=device), (torch.arange(len(kept), device=device) - kept)[None])
    rotation = Rotation(cos[0], sin[0])
    for layer in layers:
        keys = rotation(layer.keys[0, :, kept].float().transpose(0, 1)).transpose(0, 1)
        layer.keys, layer.values = keys[None].to(layer.keys.dtype), layer.values[:, :, kept]


class Crossed(Peer):
    """Mllama's: keys and values of all frames so far in blocks of their own, one behind `every` others."""

    def __init__(self, model: Any, encode: Callable[[Tensor], Tensor], every: int, *beside: nn.Module) -> None:
        super().__init__(model, encode, *beside)
        self.every = every

    def skip(self, turns: int, said: Tensor, features: Tensor) -> None:
        self.fill(turns * said.shape[1], turns * len(features), self.every)

    def inputs(self, ids: Tensor, features: Tensor | None) -> dict[str, Tensor]:
        return {"input_ids": ids} if features is None else {"input_ids": ids, "cross_attention_states": features[None]}


class Fused(Peer):
    """CASA: a frame is seen within its window. grid: int64 (1, 3), its patches."""

    def __init__(self, model: Any, grid: Tensor) -> None:
        super().__init__(model, partial(model.encode_images, image_grid_thw=grid))
        self.frame = {"image_grid_thw": grid, "image_positions": grid.new_zeros(1, 2)}

    def begin(self, prompt: Tensor) -> None:
        self.cache = self.model.new_cache()
        self.call(prompt)

    def inputs(self, ids: Tensor, features: Tensor | None) -> dict[str, Tensor]:
        return {"input_ids": ids} if features is None else {"input_ids": ids, "image_features": features, **self.frame}

    def skip(self, turns: int, said: Tensor, features: Tensor) -> None:
        if self.cache.stream is not None:  # insertion: positions and places are told apart, so that all is fed
            for _ in range(turns):
                self.call(said, features)
            return
        self.fill(turns * said.shape[1])
        self.cache.count(None, [], 1, turns * said.shape[1])

    @property
    def held(self) -> int:
        return self.cache.num_bytes


def new_peers(settings: PeersSettings) -> tuple[dict[str, Peer], Tensor]:
    """All contestants, and a frame's pixels, of noise."""
    if settings.shape is None:
        return _over_smolvlm(settings)
    generator = torch.Generator().manual_seed(settings.seed)
    made: dict[str, Peer] = {}
    picture: dict[str, Tensor] = {}
    for name, method in ((INSERTION, "insertion"), (ALL, "casa")):
        model = fresh_model(method, settings.shape, pick_device(settings.device), settings.seed).eval()
        picture = picture or random_picture(model, settings.image_tokens, generator)
        made[name] = Fused(model, picture["image_grid_thw"])
    return made, picture["pixel_values"]


def _over_smolvlm(settings: PeersSettings) -> tuple[dict[str, Peer], Tensor]:
    """One tower, connector and text model for all, copied where layers are added."""
    torch.manual_seed(settings.seed)
    text = small_backbone(settings.backbone)
    config = SmolVLMConfig(
        text_config=text.config,
        vision_config=TOWER,
        scale_factor=SHUFFLE,
        image_token_id=text.config.vocab_size - 1,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    vlm: Any = SmolVLMForConditionalGeneration(config)
    vlm.model.text_model.load_state_dict(text.get_decoder().state_dict())
    vlm.lm_head.load_state_dict(cast(Any, text).lm_head.state_dict())
    device, dtype = pick_device(settings.device), DTYPES[settings.dtype]
    vlm.eval().to(device=device, dtype=dtype)
    del text
    crossed: Any = MllamaForCausalLM(_with_crossed_blocks(config.text_config, settings.every))
    fusions = {EVERY.format(settings.every): FusionConfig(every=settings.every), ALL: FusionConfig()}
    fused: dict[str, Any] = {name: adapt(copy.deepcopy(vlm), fusion) for name, fusion in fusions.items()}
    for model in (crossed, *fused.values()):
        model.eval().to(device=device, dtype=dtype)

    def encode(pixels: Tensor) -> Tensor:
        return vlm.model.get_image_features(pixels[None]).pooler_output[0]

    side = TOWER["image_size"] // TOWER["patch_size"]
    grid = torch.tensor([[1, side, side]], device=device)
    sizes = settings.sinks, settings.window_text, settings.window_frames
    made = {
        INSERTION: Inserted(vlm, encode),
        WINDOW: Windowed(vlm, encode, *sizes),
        CROSS: Crossed(crossed, encode, settings.every, vlm.model.vision_model, vlm.model.connector),
        **{name: Fused(model, grid) for name, model in fused.items()},
    }
    return made, torch.randn(1, 3, TOWER["image_size"], TOWER["image_size"]).to(device, dtype)


def _with_crossed_blocks(text: Any, every: int) -> MllamaTextConfig:
    """The text model's blocks, and one of cross-attention before each `every` of them, as Mllama has them."""
    total = text.num_hidden_layers + text.num_hidden_layers // every
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    same += ("bos_token_id", "eos_token_id")
    return MllamaTextConfig(
        **{name: getattr(text, name) for name in same},
        num_hidden_layers=total,
        cross_attention_layers=list(range(every, total, every + 1)),
        pad_token_id=0,
    )


@torch.inference_mode()
def bench_peers(settings: PeersSettings) -> Benchmark:
    """Every contestant takes each turn beside the others; from each of `turns` on, `samples` of them are timed."""
    device = pick_device(settings.device)
    now = clock(device, settings.cpu_time)
    made, pixels = new_peers(settings)
    generator = torch.Generator().manual_seed(settings.seed)
    vocabulary = made[INSERTION].model.config.get_text_config().vocab_size

    def words(count: int) -> Tensor:
        return torch.randint(3, vocabulary - 1, (1, count), generator=generator).to(device)

    features = {name: peer.encode(pixels) for name, peer in made.items()}
    turns = {turn + more: at for at, turn in enumerate(settings.turns) for more in range(settings.samples)}

    def watch(timed: Mapping[int, int]) -> dict[str, list[list[PeerTurn]]]:
        found: dict[str, list[list[PeerTurn]]] = {name: [[] for _ in settings.turns] for name in made}
        prompt = words(PROMPT)
        for peer in made.values():
            peer.begin(prompt)
        before = 0
        for turn, at in timed.items():
            said = words(settings.tokens)
            for name, peer in made.items():
                if turn > before + 1:
                    peer.skip(turn - before - 1, said, features[name])
                found[name][at].append(_timed(peer, pixels, said, now))
            before = turn
        return found

    watch({1: 0, 2: 0})  # what is made at the first time only is made
    found = watch(turns)
    figures: Figures = {"turns": list(settings.turns)}
    for name, taken in found.items():
        medians = [[median(column) for column in zip(*part, strict=True)] for part in taken]
        encode, first, token, held = ([row[at] for row in medians] for at in range(4))
        figures[name] = {
            "encode_ms": [round(1000 * value, 2) for value in encode],
            "first_token_ms": [round(1000 * value, 2) for value in first],
            "tokens_per_second": [round(1 / value, 2) for value in token],
            "cache_bytes": [int(value) for value in held],
            "weight_bytes": made[name].weights,
        }
    told = {name: value for name, value in asdict(settings).items() if name not in ("backbone", "device", "turns")}
    shown = peers_table(figures)
    return Benchmark("peers", told, figures, shown, device, settings.backbone, peers_panels(figures))


def _timed(peer: Peer, pixels: Tensor, said: Tensor, now: Callable[[], float]) -> PeerTurn:
    """A turn as a user has it: pixels, the first token, and the others one by one, each picked greedily."""
    begun = now()
    features = peer.encode(pixels)
    encoded = now()
    token = peer.call(said[:, :1], features)
    first = now()
    for _ in range(1, said.shape[1]):
        token = peer.call(token)
    each = (now() - first) / (said.shape[1] - 1)
    held = peer.held
    peer.end_turn()
    return PeerTurn(encoded - begun, first - begun, each, held)


def peers_panels(figures: Figures) -> tuple[Panel, ...]:
    """First token, speed and cache over the frames."""
    shown = (
        ("first token, s (encoder included)", "first_token_ms", 1000),
        ("tokens a second", "tokens_per_second", 1),
        ("cache, MiB", "cache_bytes", 2**20),
    )
    turns = figures["turns"]
    return tuple(
        Panel(
            "frame", title, {n: (turns, [v / unit for v in found[key]]) for n, found in figures.items() if n != "turns"}
        )
        for title, key, unit in shown
    )


def peers_table(figures: Figures) -> str:
    """Contestants as lines; figures of every turn behind each other."""
    turns = " -> ".join(map(str, figures["turns"]))

    def row(name: str, found: Figures) -> Figures:
        firsts = " -> ".join(f"{value:.0f}" for value in found["first_token_ms"])
        speeds = " -> ".join(f"{value:.1f}" for value in found["tokens_per_second"])
        held = " -> ".join(f"{value / 2**20:.1f}" for value in found["cache_bytes"])
        return {"name": name, "first": firsts, "speed": speeds, "held": held, "weights": found["weight_bytes"]}

    columns = {f"frame {turns}": "{name}", "first token, ms": "{first}", "tokens/s": "{speed}", "cache, MiB": "{held}"}
    rows = [row(name, found) for name, found in figures.items() if name != "turns"]
    return table(rows, columns | {"weights": "{weights!M:.0f} MiB"})
