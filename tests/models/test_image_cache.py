"""A picture that was looked at is not looked at again; whatever would change the result finds nothing."""

import copy
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from casa.errors import UserError
from casa.models import ImageCache
from casa.models.image_cache import encode_pixels
from casa.pipeline import CasaPipeline
from casa.testing import PATIENCE, TinySample, tiny_casa, tiny_casa_over, tiny_processor
from tests.few import few_first

SAMPLE = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)))
KINDS = ["llama", "qwen2_5_vl", "qwen3_vl", "smolvlm"]


class Counted:
    """How often a model's pictures are encoded, and how often they are projected."""

    def __init__(self, model, monkeypatch):
        self.encoded = self.projected = 0
        encode, project = model.encode_images, model.image_keys_values

        def encode_images(*given):
            self.encoded += 1
            return encode(*given)

        def image_keys_values(*given):
            self.projected += 1
            return project(*given)

        monkeypatch.setattr(model, "encode_images", encode_images)
        monkeypatch.setattr(model, "image_keys_values", image_keys_values)

    @property
    def both(self):
        return self.encoded, self.projected


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(5).integers(0, 255, (56, 84, 3), dtype=np.uint8))


@pytest.fixture
def inputs():
    return SAMPLE.inputs()


def image_of(inputs):
    return {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}


def found(cache, model, inputs, scope=""):
    """Whether the pictures are there."""
    before = cache.hits
    cache.inputs(model, inputs, scope)
    return cache.hits - before == len(inputs["image_grid_thw"])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fusion",
    few_first(
        [{}, {"update_images": True}, {"share_weights": True}, {"method": "insertion"}], [{"update_images": True}]
    ),
    ids=str,
)
def test_logits_are_those_without_it(kind, fusion, close):
    model = tiny_casa_over(kind, **fusion)
    inputs = (SAMPLE.in_squares() if kind == "smolvlm" else SAMPLE).inputs()
    cache = ImageCache()
    first, second = (model(**cache.inputs(model, inputs)).logits for _ in range(2))
    assert (cache.hits, cache.misses) == (len(inputs["image_grid_thw"]),) * 2
    assert torch.equal(first, second)
    close(second, model(**inputs).logits)


@torch.no_grad()
def test_the_second_question_encodes_and_projects_nothing(picture, monkeypatch):
    model = tiny_casa(dtype=torch.float32)
    eyes = CasaPipeline(model, tiny_processor())
    calls = Counted(model, monkeypatch)
    one = eyes.ask(picture, "what?", max_new_tokens=4)
    assert calls.both == (1, 1)
    assert eyes.ask([picture, picture], "and now?", max_new_tokens=4)
    assert eyes.ask(picture, ["what?", "who?", "why?"], max_new_tokens=4)[0] == one
    assert calls.both == (1, 1)
    without = CasaPipeline(model, tiny_processor(), image_cache="off")
    assert without.ask(picture, "what?", max_new_tokens=4) == one
    assert calls.encoded == 2


def test_a_question_about_the_frame_at_hand_encodes_and_projects_nothing(picture, monkeypatch):
    model = tiny_casa(dtype=torch.float32)
    session = CasaPipeline(model, tiny_processor()).stream(max_new_tokens=4)
    calls = Counted(model, monkeypatch)
    session.step(picture)
    before = calls.both
    session.ask("what?")
    session.ask("who?")
    assert calls.both == before


def test_what_is_kept_is_not_written_to(inputs):
    model, cache = tiny_casa(), ImageCache()
    kept = cache.read(model, image_of(inputs))["image_keys_values"]
    before = kept.clone()
    with torch.no_grad():
        model.generate(**cache.inputs(model, inputs), max_new_tokens=4, do_sample=False)
    assert torch.equal(kept, before)


def by_optimiser(model):
    optimiser = torch.optim.AdamW([next(model.vision.parameters())], lr=0.1)
    next(model.vision.parameters()).grad = torch.ones_like(next(model.vision.parameters()))
    optimiser.step()


def by_data(model):
    model.projector.state_dict()  # touches nothing
    next(model.projector.parameters()).data.mul_(1.5)


def by_set_data(model):
    weight = model.casa_layers["1"].v_proj.weight
    weight.data = weight.data + 1


def by_loading(model):
    model.load_state_dict({name: tensor + 0.5 for name, tensor in model.state_dict().items()})


def of_a_norm(model):
    with torch.no_grad():
        model.decoder.blocks[1].input_layernorm.weight.add_(1)


@pytest.mark.parametrize("change", [by_optimiser, by_data, by_set_data, by_loading, of_a_norm])
def test_other_weights_find_nothing(inputs, change, tmp_path):
    model = tiny_casa()
    for cache in (ImageCache(), ImageCache(0, tmp_path)):
        trained = copy.deepcopy(model)
        assert not found(cache, trained, inputs)
        assert found(cache, trained, inputs)
        change(trained)
        assert not found(cache, trained, inputs)
        # the weights of before are known again
        assert found(cache, model, inputs)
        with torch.no_grad():
            assert not torch.equal(
                cache.read(trained, image_of(inputs))["image_keys_values"],
                cache.read(model, image_of(inputs))["image_keys_values"],
            )


def test_weights_of_the_text_change_nothing(inputs):
    model, cache = tiny_casa(), ImageCache()
    cache.inputs(model, inputs)
    with torch.no_grad():
        model.decoder.blocks[0].mlp.up_proj.weight.add_(1)
        model.get_output_embeddings().weight.add_(1)
    assert found(cache, model, inputs)


def test_but_those_that_images_go_through_do(inputs):
    model, cache = tiny_casa(update_images=True), ImageCache()
    cache.inputs(model, inputs)
    with torch.no_grad():
        model.decoder.blocks[0].mlp.up_proj.weight.add_(1)
    assert not found(cache, model, inputs)


def test_other_precision_fusion_and_pixels_find_nothing(inputs):
    model, cache = tiny_casa(), ImageCache()
    cache.inputs(model, inputs)
    assert not found(cache, copy.deepcopy(model).to(torch.float32), inputs)
    assert not found(cache, tiny_casa(every=2), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert not found(cache, model, inputs)
    other = copy.deepcopy(model)
    other.config.vision_config.hidden_act = "relu"
    assert not found(cache, other, inputs)
    changed = inputs | {"pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][-1, -1] += 1e-6
    assert not found(cache, model, changed)
    assert found(cache, model, inputs)


def test_other_settings_of_the_processor_find_nothing(picture):
    model, cache = tiny_casa(dtype=torch.float32), ImageCache()
    one, other = tiny_processor(), tiny_processor()
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    for processor in (one, other):
        CasaPipeline(model, processor, cache).ask(picture, "what?", max_new_tokens=1)
    assert (cache.hits, cache.misses) == (0, 2)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
def test_other_adapters_find_nothing(inputs):
    peft = pytest.importorskip("peft")
    model, cache = tiny_casa(), ImageCache()
    cache.inputs(model, inputs)
    chosen = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=r".*casa_layers\.\d+\.(k|v)_proj", init_lora_weights=False
    )
    wrapped = peft.get_peft_model(model, chosen).eval()
    wrapped.add_adapter("other", chosen)
    assert not found(cache, model, inputs)
    wrapped.set_adapter("other")
    assert not found(cache, model, inputs)
    with wrapped.disable_adapter():
        assert not found(cache, model, inputs)
    wrapped.set_adapter("default")
    assert found(cache, model, inputs)
    merged = cache.misses
    wrapped.merge_adapter()
    assert not found(cache, model, inputs)
    assert cache.misses > merged


def test_a_scope_is_private(inputs):
    model, cache = tiny_casa(), ImageCache()
    cache.inputs(model, inputs, "one")
    assert not found(cache, model, inputs, "two")
    assert not found(cache, model, inputs)
    assert found(cache, model, inputs, "one")


def test_memory_is_bounded_and_the_longest_unused_leaves(inputs):
    model = tiny_casa()
    pictures = [image_of(inputs) | {"pixel_values": inputs["pixel_values"] + shift} for shift in range(5)]
    size = ImageCache().read(model, pictures[0])["image_keys_values"].nbytes
    cache = ImageCache(max_bytes=3 * size)
    for number in (0, 1, 2, 0, 3):
        cache.read(model, pictures[number])
        assert cache.held <= 3 * size
    before = cache.hits
    for number in (0, 2, 3):
        cache.read(model, pictures[number])
    assert cache.hits == before + 3
    cache.read(model, pictures[1])
    assert cache.hits == before + 3
    small = ImageCache(max_bytes=size - 1)
    small.read(model, pictures[0])
    assert small.held == 0


def test_a_folder_is_shared_and_bounded(inputs, tmp_path):
    model = tiny_casa()
    mine = tmp_path / "ab" / "mine.safetensors.txt"
    mine.parent.mkdir()
    mine.write_text("of somebody else")
    one, other = ImageCache(folder=tmp_path), ImageCache(folder=tmp_path)
    kept = one.read(model, image_of(inputs))["image_keys_values"]
    again = other.read(copy.deepcopy(model), image_of(inputs))["image_keys_values"]
    assert (other.hits, other.misses) == (1, 0)
    assert torch.equal(kept, again)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    small = ImageCache(0, tmp_path, max_folder_bytes=3 * size)
    for shift in range(9):
        small.read(model, image_of(inputs) | {"pixel_values": inputs["pixel_values"] + shift})
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 3 * size
    assert mine.exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another"])
def test_a_damaged_file_is_looked_past(inputs, tmp_path, damage):
    model, cache = tiny_casa(), ImageCache(0, tmp_path)
    kept = cache.read(model, image_of(inputs))["image_keys_values"]
    other = image_of(inputs) | {"pixel_values": inputs["pixel_values"] + 1}
    (path,) = tmp_path.rglob("*.safetensors")
    data = path.read_bytes()
    if damage == "another":
        cache.read(model, other)
        (second,) = set(tmp_path.rglob("*.safetensors")) - {path}
        path.write_bytes(second.read_bytes())
    else:
        path.write_bytes({"cut": data[:-3], "empty": b"", "flipped": data[:-1] + bytes([data[-1] ^ 1])}[damage])
    hits = cache.hits
    assert torch.equal(cache.read(model, image_of(inputs))["image_keys_values"], kept)
    assert cache.hits == hits
    assert path.read_bytes() == data


WRITER = """
import torch
from casa.models import ImageCache
from casa.testing import TinySample, tiny_casa
model, cache = tiny_casa(), ImageCache(0, {folder!r})
given = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2))).inputs()
image = {{name: given[name] for name in ("pixel_values", "image_grid_thw")}}
shift = 0
while True:
    cache.read(model, image | {{"pixel_values": image["pixel_values"] + shift}})
    shift += 1
    print(shift, flush=True)
"""


@pytest.mark.slow
def test_whatever_moment_it_is_killed_at_all_files_are_whole(inputs, tmp_path):
    command = [sys.executable, "-c", WRITER.format(folder=str(tmp_path))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        while int(writer.stdout.readline()) < 20:
            pass
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait(PATIENCE)
    model, cache = tiny_casa(), ImageCache(0, tmp_path)
    for shift in range(20):
        made = cache.read(model, image_of(inputs) | {"pixel_values": inputs["pixel_values"] + shift})
        truth = encode_pixels(model, image_of(inputs) | {"pixel_values": inputs["pixel_values"] + shift})
        assert torch.equal(made["image_keys_values"], truth["image_keys_values"])
    assert (cache.hits, cache.misses) == (20, 0)


def test_a_model_that_trains_keeps_nothing(inputs):
    model, cache = tiny_casa().train(), ImageCache()
    assert cache.inputs(model, inputs).keys() == inputs.keys()
    cache.read(model, image_of(inputs))
    assert cache.held == 0


def test_where_is_said_in_words(tmp_path):
    assert ImageCache.named("off") is None
    assert ImageCache.named("memory").folder is None
    assert ImageCache.named(tmp_path / "new").folder is not None
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another folder"):
        ImageCache.named(tmp_path / "file" / "in")
    with pytest.raises(UserError, match="0 or more"):
        ImageCache(max_bytes=-1)
