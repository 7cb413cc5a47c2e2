"""What training takes: a step's memory beside insertion, samples a second packed and padded, how full packs are.

    memory        the same model and packed batch by every method, image tokens growing, each in a process of its own.
                  step: the peak less what was held before the step, of the process on a CPU and of torch on CUDA; with
                  gradients and AdamW's moments of all that is trained, of which CASA has more: its own layers'.
                  kept: of that, what the forward pass keeps for the backward one, counted, the same on every machine.
    throughput    packed rows beside padded batches of the same samples, in turns. Image tokens are made beforehand,
                  without gradients: the tower sees no padding either way.
                  padded     a a a a . . . .        as many rows as a pack holds samples, in the order they came, filled
                             b b b b b b b b        up to the longest: the text model computes the filling as well
                  packed     a a a a b b b b b b b b        one row, filled to its budget
    packing       what stays empty of the paper's budgets, with the reader's own buffer

Weights and pictures are random. Shapes: T text tokens, N image tokens, n samples of one picture each, P patches.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate
from statistics import median

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from casa.analysis.published_models import shapes_of
from casa.benchmarks.harness import Benchmark, Figures, clock, in_own_process, table, take_turns
from casa.benchmarks.packing import SampleLength, measure_packing, spread_lengths, stage_lengths
from casa.benchmarks.settings import TrainSettings
from casa.errors import UserError
from casa.memory import max_memory_allocated, memory_allocated, peak_resident_bytes, reset_peak_memory
from casa.models import CasaForConditionalGeneration, FusionConfig, adapt
from casa.models.auto import pick_device
from casa.models.backbones import new_backbone
from casa.models.losses import IGNORE_INDEX
from casa.training.config import BUDGETS, PackingSettings, TokenBudget
from casa.training.packed_dataset import Packer
from casa.vision import new_encoder

Batch = dict[str, Tensor]

TINY = "tiny"
METHODS = {
    "casa": FusionConfig(),
    "before": FusionConfig.before(),
    "replace": FusionConfig.replace(every=4),
    "update_images": FusionConfig(update_images=True),
    "cross_attention": FusionConfig.cross_attention(),
    "insertion": FusionConfig.insertion(),
}
LOSS_CHUNK = 1024
STEPS = 2  # the second has moments, and meets what the first has left
DRAWS = 3  # of the samples that go through packed and padded
PROPORTIONED = "in proportion"  # samples of one picture, in the proportion of the budget
IMAGE_STAGE = "image stage"  # the paper's first: short questions, pages of text, several pictures, text alone
# budgets of the packs that are timed: the image stage's, and its samples, are made four times smaller
KINDS = {
    PROPORTIONED: TokenBudget(text=512, image=2560),
    IMAGE_STAGE: TokenBudget(text=BUDGETS["image"].text // 4, image=BUDGETS["image"].image // 4),
}


def bench_train(settings: TrainSettings) -> Benchmark:
    """The parts that are asked for.

    Raises:
        UserError: Too few numbers of image tokens, or a process that fails, of memory perhaps.
    """
    settings = replace(settings, device=str(pick_device(settings.device)))
    figures: Figures = {}
    tables = []
    if "memory" in settings.parts:
        figures["memory"] = train_memory(settings)
        tables.append(memory_table(figures["memory"]))
    if "throughput" in settings.parts:
        figures["throughput"] = throughput(settings)
        tables.append(throughput_table(figures["throughput"]))
    if "packing" in settings.parts:
        figures["packing"] = packing(seed=settings.seed)
        tables.append(packing_table(figures["packing"]))
    return Benchmark("train", {"seed": settings.seed}, figures, "\n\n".join(tables), settings.device)


def fresh_model(method: str, shape: str = TINY, device: str = "cpu", seed: int = 0) -> CasaForConditionalGeneration:
    """A model of that shape with random weights, all to be trained; published shapes are in bf16."""
    text, tower = _tiny() if shape == TINY else shapes_of(shape, published=True)
    usual = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float32 if shape == TINY else torch.bfloat16)
    try:
        with torch.device(device):
            backbone = new_backbone(copy.deepcopy(text))
            encoder = None if tower is None else new_encoder(copy.deepcopy(tower))
            model = adapt(backbone, METHODS[method], vision=encoder)
    finally:
        torch.set_default_dtype(usual)
    model.requires_grad_(True)
    model.loss_chunk = LOSS_CHUNK
    return model.train()


def random_picture(model: CasaForConditionalGeneration, tokens: int, generator: torch.Generator) -> Batch:
    """`pixel_values` (P, channels of a patch) and `image_grid_thw` (1, 3) of a picture of so many tokens."""
    config = model.config.encoder_config
    merge = config.spatial_merge_size
    rows, columns = most_square(tokens)
    channels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(tokens * merge**2, channels, generator=generator)
    grid = torch.tensor([(1, merge * rows, merge * columns)])
    return {"pixel_values": pixels.to(model.device), "image_grid_thw": grid.to(model.device)}


def most_square(tokens: int) -> tuple[int, int]:
    """Rows and columns of so many tokens, as square as their number allows."""
    rows = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return rows, tokens // rows


def _tiny() -> tuple[PreTrainedConfig, PreTrainedConfig]:
    text = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16_384,
        tie_word_embeddings=True,
    )
    tower = Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=2,
        patch_size=14,
        temporal_patch_size=1,
        out_hidden_size=128,
        fullatt_block_indexes=[1],
    )
    return text, tower


class RandomSamples:
    """Samples of one picture or none, with random tokens. encoded: pictures are image tokens (N, d_v) already."""

    def __init__(
        self, model: CasaForConditionalGeneration, lengths: Sequence[SampleLength], seed: int = 0, encoded: bool = True
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.config.get_text_config().vocab_size
        self.ids: list[Tensor] = []
        self.images: list[Batch] = []  # empty for text alone
        for length in lengths:
            ids = torch.randint(1, vocabulary, (length.text_tokens,), generator=generator)
            self.ids.append(ids.to(model.device))
            images = random_picture(model, length.image_tokens, generator) if length.image_tokens else {}
            if images and encoded:
                with torch.no_grad():
                    images["image_features"] = model.encode_images(**images)
                del images["pixel_values"]
            self.images.append(images)

    def packed(self, chosen: Sequence[int]) -> Batch:
        """Samples in one row."""
        ids = [self.ids[index] for index in chosen]
        row = torch.cat(ids)
        starts = list(accumulate(map(len, ids), initial=0))[:-1]
        labels = row.clone()
        labels[starts] = IGNORE_INDEX  # nothing predicts the first token of a sample
        positions = torch.cat([torch.arange(len(each)) for each in ids]).to(row.device)
        batch = {"input_ids": row[None], "labels": labels[None], "position_ids": positions[None]}
        return batch | self._images(chosen, [(0, start) for start in starts])

    def padded(self, chosen: Sequence[int]) -> Batch:
        """A row for each sample, padded on the left."""
        ids = [self.ids[index] for index in chosen]
        labels = [torch.cat([each.new_full((1,), IGNORE_INDEX), each[1:]]) for each in ids]
        filled = partial(pad_sequence, batch_first=True, padding_side="left")
        empty = [max(map(len, ids)) - len(each) for each in ids]
        return {
            "input_ids": filled(ids),
            "attention_mask": filled([torch.ones_like(each) for each in ids]),
            "labels": filled(labels, padding_value=IGNORE_INDEX),
            **self._images(chosen, list(enumerate(empty))),
        }

    def _images(self, chosen: Sequence[int], places: Sequence[tuple[int, int]]) -> Batch:
        """places: row and token before which each sample's picture stands, if it has one."""
        pairs = zip(chosen, places, strict=True)
        shown = [(self.images[index], place) for index, place in pairs if self.images[index]]
        if not shown:
            return {}
        joined = {name: torch.cat([images[name] for images, _ in shown]) for name in shown[0][0]}
        return {"image_positions": torch.tensor([place for _, place in shown], device=self.ids[0].device), **joined}


def step_batch(settings: TrainSettings, model: CasaForConditionalGeneration, image_tokens: int) -> Batch:
    """A row of samples, every picture before its sample's text: what `model` takes, labels included."""
    count = settings.samples
    each = SampleLength(settings.text_tokens // count, image_tokens // count)
    return RandomSamples(model, [each] * count, settings.seed, encoded=False).packed(range(count))


def measure_step(settings: Figures, method: str, image_tokens: int) -> Figures:
    """Bytes of a training step in this process: `before` it, at its `peak`, and the `step`'s own, the difference; and
    those that are `kept` for the backward pass. settings: of `TrainSettings`, as plain values."""
    chosen = TrainSettings(**settings)
    device = torch.device(chosen.device)
    model = fresh_model(method, chosen.shape, chosen.device, chosen.seed)
    if chosen.frozen_tower:
        model.encoder.requires_grad_(False)
    if chosen.checkpoint_blocks:
        model.gradient_checkpointing_enable()
    batch = step_batch(chosen, model, image_tokens)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    # threads, code and work space of torch's kernels: 50 MiB on a CPU, whatever the step
    few = 16 * chosen.samples
    model(**step_batch(replace(chosen, text_tokens=few), model, few), use_cache=False).loss.backward()
    optimiser.zero_grad()
    before = memory_allocated(device)
    reset_peak_memory(device)  # making the model may have held more than a step does
    final, seconds, now = math.nan, math.nan, clock(device)
    for _ in range(STEPS):
        begun = now()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        final = float(loss.detach())
        seconds = now() - begun  # of the last step: the first makes the moments
    peak, kept = max_memory_allocated(device), kept_bytes(model, batch)
    speed = round(chosen.text_tokens / seconds, 1)
    found = {"before": before, "peak": peak, "step": peak - before, "kept": kept}
    return {**found, "loss": final, "text_tokens_per_second": speed}


def kept_bytes(model: torch.nn.Module, batch: Batch) -> int:
    """What the forward pass of a batch with labels keeps for the backward one, parameters left out.

    A storage that several operations keep counts once, as a whole.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        # an operation that was handed its own result back would keep itself for ever
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # until the end of the block all of it is held, so no address is used twice
        output = model(**batch, use_cache=False)
    del output
    return sum(kept.values())


def train_memory(settings: TrainSettings) -> Figures:
    """Every method and number of image tokens in a process of its own, and what is told of them: bytes that each
    further image token takes, at the peak and kept; and how many times as much insertion takes as each other method.

    Raises:
        UserError: There is one number of image tokens, or the system does not tell what a process has held.
    """
    counts = sorted(set(settings.image_tokens))
    if len(counts) < 2:
        raise UserError("give two or more numbers of image tokens, to see how memory grows.", field="image_tokens")
    if settings.device == "cpu" and not peak_resident_bytes():
        raise UserError("this system does not tell how much memory a process has held; measure on Linux.")
    rows: list[Figures] = [
        {"method": method, "image_tokens": count, **in_own_process(measure_step, asdict(settings), method, count)}
        for count in counts
        for method in settings.methods
    ]
    by_method = {method: [row for row in rows if row["method"] == method] for method in settings.methods}
    growth = {
        size: {
            method: (found[-1][size] - found[0][size]) / (counts[-1] - counts[0]) for method, found in by_method.items()
        }
        for size in ("peak", "kept")
    }

    def compared(method: str) -> Figures:
        pairs = list(zip(by_method["insertion"], by_method[method], strict=True))
        ratios: Figures = {
            size: {str(row["image_tokens"]): round(other[size] / row[size], 2) for other, row in pairs}
            for size in ("step", "kept")
        }
        for size, each in growth.items():
            ratios[f"growth of {size}"] = round(each["insertion"] / each[method], 2) if each[method] > 0 else None
        return ratios

    case = ("text_tokens", "samples", "shape", "device", "checkpoint_blocks", "frozen_tower", "seed")
    each_token = {size: {method: round(more) for method, more in each.items()} for size, each in growth.items()}
    found = {
        "case": {name: getattr(settings, name) for name in case},
        "rows": rows,
        "bytes_per_image_token": each_token,
    }
    others = [method for method in settings.methods if method != "insertion"] if "insertion" in by_method else []
    return found | ({"insertion_over": {method: compared(method) for method in others}} if others else {})


def memory_table(found: Figures) -> str:
    columns = {"image tokens": "{image_tokens:,}", "method": "{method}", "before": "{before!M:,.1f} MiB"}
    columns |= {"peak": "{peak!M:,.1f} MiB", "of the step": "{step!M:,.1f} MiB"}
    columns |= {"kept for backward": "{kept!M:,.1f} MiB", "text tokens/s": "{text_tokens_per_second:,.0f}"}
    lines = [table(found["rows"], columns)]
    growth = found["bytes_per_image_token"]
    for method, peak in growth["peak"].items():
        kept = growth["kept"][method]
        lines.append(f"{method}: {peak / 1024:,.1f} KiB more for each image token, {kept / 1024:,.1f} KiB of them kept")
    return "\n".join(lines)


def ways_of(lengths: Sequence[SampleLength], budget: TokenBudget) -> dict[str, list[list[int]]]:
    """Numbers of the samples of every batch: packed; and padded, in the order they came."""
    packer: Packer[SampleLength] = Packer(PackingSettings(budget=budget, buffer_size=len(lengths)))
    for length in lengths:
        packer.add(length)
    number = {id(length): index for index, length in enumerate(lengths)}
    packs = []
    while len(packer):
        packs.append([number[id(length)] for length in packer.pack()])
    rows = max(1, round(len(lengths) / len(packs)))
    everyone = list(range(len(lengths)))
    return {"packed": packs, "padded": [everyone[at : at + rows] for at in range(0, len(lengths), rows)]}


def text_slots(lengths: Sequence[SampleLength], ways: Mapping[str, list[list[int]]]) -> dict[str, int]:
    """Text positions that are computed, packed and padded: what the two cost, whatever the clock says."""
    padded = (len(rows) * max(lengths[index].text_tokens for index in rows) for rows in ways["padded"])
    return {"packed": sum(length.text_tokens for length in lengths), "padded": sum(padded)}


def drawn_lengths(kind: str, samples: int, budget: TokenBudget, seed: int = 0) -> list[SampleLength]:
    """Those of the samples that go through packed and padded; some 25 of them fill a pack."""
    if kind == PROPORTIONED:
        return spread_lengths(samples, budget, seed, images=budget.image / 32)
    text, image = BUDGETS["image"].text / budget.text, BUDGETS["image"].image / budget.image
    found = stage_lengths("image", samples, seed)[:samples]
    return [SampleLength(max(2, int(length.text_tokens / text)), int(length.image_tokens / image)) for length in found]


def throughput(settings: TrainSettings, draws: int = DRAWS, budgets: Mapping[str, TokenBudget] = KINDS) -> Figures:
    """Seconds of one pass over the samples, forward and backward, packed and padded, in turns; medians over rounds, for
    each kind of samples and each draw of them. The losses of both ways are the same mean over tokens, told along.

    What packing gains hangs on how lengths are spread. budgets: of packs, by kind.
    """
    model = fresh_model("casa", settings.shape, settings.device, settings.seed)
    model.encoder.requires_grad_(False)
    kinds: Figures = {}
    for kind, budget in budgets.items():
        found = [
            _packed_and_padded(model, drawn_lengths(kind, settings.drawn, budget, seed), budget, settings.rounds, seed)
            for seed in range(settings.seed, settings.seed + draws)
        ]
        usual = round(median(each["packed_over_padded"] for each in found), 2)
        kinds[kind] = {"budget": [budget.text, budget.image], "packed_over_padded": usual, "draws": found}
    told = {"samples": settings.drawn, "rounds": settings.rounds, "shape": settings.shape}
    return {"settings": told, "kinds": kinds}


def _packed_and_padded(
    model: CasaForConditionalGeneration, lengths: list[SampleLength], budget: TokenBudget, rounds: int, seed: int
) -> Figures:
    """The same samples packed and padded, in turns."""
    drawn, numbers = RandomSamples(model, lengths, seed), ways_of(lengths, budget)
    makers = {"packed": drawn.packed, "padded": drawn.padded}
    batches = {way: [makers[way](chosen) for chosen in numbers[way]] for way in makers}
    text = sum(length.text_tokens for length in lengths)
    passes = {way: partial(_pass, model, batches[way], text - len(lengths)) for way in makers}
    taken = take_turns(passes, rounds)
    usual = {way: median(seconds for seconds, _ in found) for way, found in taken.items()}
    return {
        "seed": seed,
        "text_tokens": text,
        "image_tokens": sum(length.image_tokens for length in lengths),
        "packs": len(numbers["packed"]),
        "rows_of_a_padded_batch": len(numbers["padded"][0]),
        "text_slots": text_slots(lengths, numbers),
        "loss": {way: found[-1][1] for way, found in taken.items()},
        "seconds": {way: round(value, 4) for way, value in usual.items()},
        "samples_per_second": {way: round(len(lengths) / value, 2) for way, value in usual.items()},
        "packed_over_padded": round(usual["padded"] / usual["packed"], 2),
    }


def _pass(model: CasaForConditionalGeneration, batches: Sequence[Batch], learned: int) -> tuple[float, float]:
    """Seconds of forward and backward over all batches, and the mean loss of the learned tokens."""
    now, total = clock(model.device), 0.0
    began = now()
    for batch in batches:
        loss = model(**batch, use_cache=False, num_items_in_batch=learned).loss
        loss.backward()
        total += float(loss.detach())
    spent = now() - began
    model.zero_grad(set_to_none=True)
    return spent, total


def throughput_table(found: Figures) -> str:
    """Both ways: each draw of each kind of samples, and what packing gains in the median of draws."""
    columns = {"samples/s": "{kind}", "draw": "{seed}"}
    for name, title, form in (
        ("samples_per_second", "", ":,.1f"),
        ("text_slots", " slots", ":,"),
        ("loss", " loss", ":.4f"),
    ):
        columns |= {f"{way}{title}": f"{{{name}[{way}]{form}}}" for way in ("packed", "padded")}
    kinds = found["kinds"]
    rows = [{"kind": kind, **draw} for kind, row in kinds.items() for draw in row["draws"]]
    usual = ", ".join(f"{kind} {row['packed_over_padded']:.2f}x" for kind, row in kinds.items())
    return f"{table(rows, columns | {'gain': '{packed_over_padded:.2f}x'})}\npacked over padded, medians: {usual}"


def packing(samples: int = 2000, seed: int = 0) -> Figures:
    """What stays empty of the budgets, by kind of samples; of what is empty, what no packer could have filled."""
    drawn = {PROPORTIONED: ("image", spread_lengths(samples, BUDGETS["image"], seed))}
    drawn |= {stage: (stage, stage_lengths(stage, samples, seed)) for stage in BUDGETS}
    found: Figures = {}
    for kind, (stage, lengths) in drawn.items():
        settings = PackingSettings(budget=BUDGETS[stage])
        sizes: Figures = {"budget": [settings.budget.text, settings.budget.image]}
        sizes["buffer"] = [settings.buffer_size, settings.buffer_mb]
        found[kind] = {**sizes, **asdict(measure_packing(lengths, settings))}
    return found


def packing_table(found: Figures) -> str:
    """A line for each kind of samples; in brackets, what no packer could have filled."""
    columns = {"samples": "{kind}", "text empty": "{text_waste:.1%} ({least_text:.1%})"}
    columns |= {"images empty": "{image_waste:.1%} ({least_image:.1%})", "to choose from": "{choice:.0f}"}
    columns |= {"longest wait": "{longest_wait}", "padding without packs": "{padded_waste:.1%}"}
    shown = table([{"kind": kind, **row} for kind, row in found.items()], columns)
    return f"{shown}\nin brackets: what packs without a gap would leave empty, given these samples"
