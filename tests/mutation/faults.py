"""Faults that somebody could make in windows, masks, caches, positions and the loops above, and tests that notice them.

A fault replaces one piece of one file of the package by another. `check.py` makes them one by one in a copy, and runs
the tests named here against it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """file: below src/casa. old: stands in it exactly once, and becomes `new`. tests: below tests, for pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    Fault(
        "off by one: text does not see itself",
        "windows.py",
        "(torch.arange(self.num_text, device=device) <= query)",
        "(torch.arange(self.num_text, device=device) < query)",
        ("test_windows.py",),
    ),
    Fault(
        "window leak: text sees the text of the window before",
        "windows.py",
        "text = (text_window == window) &",
        "text = (text_window >= window - 1) &",
        ("test_windows.py",),
    ),
    Fault(
        "history reaches one window too far",
        "windows.py",
        "max(opening, number - self.history)",
        "max(opening, number - self.history - 1)",
        ("test_windows.py",),
    ),
    Fault(
        "sample leak: history crosses the border of packed samples",
        "windows.py",
        "if number and self.windows[number - 1].sample != window.sample:",
        "if number and False:",
        ("test_windows.py", "models/test_equivalence.py"),
    ),
    Fault(
        "text sees an image that stands behind it",
        "attention/reference.py",
        "seen.append(image_before[images] <= token)",
        "seen.append(image_before[images] <= token + 1)",
        ("attention/test_reference.py",),
    ),
    Fault(
        "padded keys of a batched call are seen",
        "attention/sdpa.py",
        "row[: shape.queries, : shape.keys] = shape.mask()",
        "row[: shape.queries] = True",
        ("attention/test_sdpa.py",),
    ),
    Fault(
        "a row that is picked twice gets one gradient of the two",
        "attention/common.py",
        "for rows, uses in gather.repeats:",
        "for rows, uses in gather.repeats[:0]:",
        ("attention/test_common.py", "attention/test_sdpa.py"),
    ),
    Fault(
        "missing zero update: text that sees no image is changed",
        "layers/casa.py",
        'update = _only(sees, get("o_proj")',
        'update = _only(None, get("o_proj")',
        ("models/test_model.py",),
    ),
    Fault(
        "unfrozen image position: an image advances its own tokens",
        "layers/step.py",
        'image = layout.on(device, "image_position")[self.plan.new_images]',
        'image = layout.on(device, "image_position")[self.plan.new_images]\n'
        "        image = image + torch.arange(len(image), device=image.device)",
        ("models/test_equivalence.py", "layers/test_casa.py"),
    ),
    Fault(
        "rows and columns of an image swapped",
        "models/passes.py",
        "torch.stack([torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)])",
        "torch.stack([torch.arange(columns).repeat(rows), torch.arange(rows).repeat_interleave(columns)])",
        ("models/test_vlms.py", "models/test_image_tokens.py"),
    ),
    Fault(
        "text goes on behind the shorter side of an inserted image",
        "models/insertion.py",
        "takes[stop - 1] = max(rows, columns)",
        "takes[stop - 1] = min(rows, columns)",
        ("models/test_vlms.py",),
    ),
    Fault(
        "stale state after reset",
        "models/cache.py",
        "self.windows = self.stream = self.mask = self.ids = None",
        "self.stream = self.mask = self.ids = None",
        ("models/test_cache.py",),
    ),
    Fault(
        "beams keep the windows of other rows",
        "models/cache.py",
        "            self.windows.select(rows)\n",
        "            self.windows.num_rows\n",
        ("models/test_cache.py", "models/test_generation.py"),
    ),
    Fault(
        "a decoding step reads slots past a row's own images",
        "layers/step.py",
        "image = (torch.arange(widest, device=self.device) < counts)",
        "image = (torch.arange(widest, device=self.device) < counts + 1)",
        ("models/test_equivalence.py",),
    ),
    Fault(
        "a decoding step does not count its token",
        "layers/step.py",
        "row[-1].longer(self.length)",
        "row[-1].longer(self.length - 1)",
        ("models/test_equivalence.py",),
    ),
    Fault(
        "forgotten text leaves later keys at their old positions",
        "models/cache.py",
        "moved = turn(rest, -count)",
        "moved = turn(rest, 0)",
        ("models/test_cache.py", "streaming/test_session.py"),
    ),
    Fault(
        "an image at the border of two packed samples goes to the first",
        "layers/plan.py",
        "if first <= p < stop or (is_last and p == stop)",
        "if first < p <= stop or (first == 0 and p == 0)",
        ("layers/test_plan.py", "models/test_equivalence.py"),
    ),
    Fault(
        "the gain of a block's norm is left out of its image keys",
        "layers/casa.py",
        "linear.weight * gain.to(linear.weight.dtype)",
        "linear.weight * 1",
        ("layers/test_image_kv.py",),
    ),
    Fault(
        "images are handed over again at every step of generation",
        "models/generation.py",
        'if not first and kwargs.get("use_cache", True):',
        "if False:",
        ("models/test_generation.py",),
    ),
    Fault(
        "an empty cache of a replaced block is asked for the mask",
        "models/cache.py",
        "if layer_idx not in self.replaced or",
        "if True or",
        ("models/test_cache.py", "models/test_local_attention.py"),
    ),
    Fault(
        "the stand-in of a replaced block is of the other kind",
        "models/cache.py",
        "slides[index] == slides[layer_idx]]",
        "slides[index] != slides[layer_idx]]",
        ("models/test_local_attention.py",),
    ),
    Fault(
        "text does not see the images of its own window",
        "windows.py",
        "(image_window <= window)",
        "(image_window < window)",
        ("test_windows.py",),
    ),
    Fault(
        "CASA ahead of a block leaves out the block's norm",
        "models/fusion.py",
        'normed = block.get_submodule("input_layernorm")(hidden)',
        "normed = hidden",
        ("models/test_definition.py",),
    ),
    Fault(
        "a gate without its tanh",
        "layers/casa.py",
        "update = update * gate.tanh().to(update.dtype)",
        "update = update * gate",
        ("models/test_definition.py",),
    ),
    Fault(
        "plain cross-attention turns queries and image keys",
        "models/passes.py",
        "rotaries = [None for _ in self.blocks]",
        "rotaries = decoder.rotaries(self.blocks, device, decoder.dtype)",
        ("models/test_definition.py",),
    ),
    Fault(
        "stale pictures stay in slots that nobody reads",
        "layers/step.py",
        "keep = self.plan.keep\n        assert keep is not None\n",
        "keep = self.plan.keep\n        assert keep is not None\n"
        "        stale = self.state.layers[0].images if self.state is not None and self.state.layers else 0\n"
        "        keep = type(keep)(F.pad(keep.image_index, (0, stale)), keep.text_index, keep.windows)\n",
        ("streaming/test_usage.py",),
    ),
    Fault(
        "the cached text of a batch of sessions is padded on the right",
        "streaming/batch.py",
        "pad(x, (0, 0, width - x.shape[2], 0))",
        "pad(x, (0, 0, 0, width - x.shape[2]))",
        ("streaming/test_batch.py", "streaming/test_engine.py"),
    ),
    Fault(
        "a caption that time cut is said to be complete",
        "streaming/batch.py",
        "self.pending, self.complete = request.stop, False",
        "self.pending, self.complete = request.stop, True",
        ("streaming/test_batch.py",),
    ),
    Fault(
        "in a batch that gets smaller, texts go on with the cache of others",
        "streaming/sampling.py",
        "rows = [rows[at] for at in still]",
        "rows = rows[-len(still) :]",
        ("streaming/test_sampling.py",),
    ),
    Fault(
        "a block of a recipe replaces that of its base",
        "training/config.py",
        "merged(before or {}, value)",
        "dict(value)",
        ("training/test_reading.py",),
    ),
    Fault(
        "answers that are drawn move torch's own random state",
        "pipeline.py",
        "with torch.random.fork_rng(devices=devices):",
        "if devices is not None:",
        ("test_pipeline.py",),
    ),
    Fault(
        "contestants of a benchmark do not take turns",
        "benchmarks/harness.py",
        "    for _ in range(rounds):\n        for name, run in contestants.items():\n",
        "    for name, run in contestants.items():\n        for _ in range(rounds):\n",
        ("benchmarks/test_harness.py",),
    ),
    Fault(
        "an evaluation: what a batch begins with reaches over pictures that differ",
        "evaluation/answering.py",
        "shared = min(shared, one[0], other[0])",
        "shared = min(shared, len(row.ids) - 1)",
        ("evaluation/test_answering.py",),
    ),
    Fault(
        "an evaluation: of a batch that is there in part, the rest is not asked",
        "evaluation/scoring.py",
        'if all(f"{one.record} {one.turn}" in file.lines for one in batch):',
        'if any(f"{one.record} {one.turn}" in file.lines for one in batch):',
        ("evaluation/test_scoring.py",),
    ),
    Fault(
        "ANLS: exactly one half counts as none",
        "evaluation/metrics.py",
        "return found if found >= 0.5 else 0.0",
        "return found if found > 0.5 else 0.0",
        ("evaluation/test_answer_metrics.py",),
    ),
    Fault(
        "VQA accuracy: nobody is left out",
        "evaluation/vqa_accuracy.py",
        "(matches - (one == given)) / enough",
        "matches / enough",
        ("evaluation/test_answer_metrics.py",),
    ),
)
