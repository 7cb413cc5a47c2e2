"""Folder-to-folder conversion: the same weights as `adapt`, for every kind of checkpoint, in little memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from casa.errors import UserError
from casa.models import CasaForConditionalGeneration, FusionConfig, adapt
from casa.models.convert import convert, parse_size
from casa.testing import PATIENCE, TEXT_BACKBONES, tiny_backbone, tiny_encoder, tiny_text_model

FRESH = ("projector.", "compressor.", "gist.")


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    tiny_encoder(dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_text_model(dtype=torch.float32).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def weights(folder):
    """Every weight in the files of a checkpoint."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        part = load_file(file)
        assert not found.keys() & part.keys()
        found |= part
    return found


def assert_same(ours, theirs):
    """Two checkpoints hold the same model; parts that start at random only in shape and dtype."""
    one, other = (CasaForConditionalGeneration.from_pretrained(folder) for folder in (ours, theirs))
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.shape, tensor.dtype) == (right[name].shape, right[name].dtype), name
        assert name.startswith(FRESH) or torch.equal(tensor, right[name]), name
    for file in ("config.json", "generation_config.json"):
        assert json.loads((ours / file).read_text()) == json.loads((theirs / file).read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fusion"),
    [
        ("llama", {}),
        ("helium", {"placement": "before", "every": 2}),
        ("gemma3_text", {"share_weights": True}),
        ("qwen3", {"method": "cross_attention", "gate": "tanh"}),
        ("qwen2_vl", {"method": "insertion"}),
        ("qwen2_5_vl", {"output": "zero", "gist": 2}),
        ("qwen3_vl", {"compressor": "pixel_shuffle:2"}),
        ("smolvlm", {"placement": "replace", "layers": (1,)}),
    ],
)
def test_converted_equals_adapted(kind, fusion, tower, tmp_path):
    tiny_backbone(kind, dtype=torch.float32).save_pretrained(tmp_path / "backbone", max_shard_size="30KB")
    vision = tower if kind in TEXT_BACKBONES else None
    adapt(tmp_path / "backbone", FusionConfig(**fusion), vision).save_pretrained(tmp_path / "adapted")
    ours = tmp_path / "converted"
    model = convert(tmp_path / "backbone", ours, FusionConfig(**fusion), vision, max_shard_size="40KB")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert len(list(ours.glob("*.safetensors"))) > 1
    assert_same(ours, tmp_path / "adapted")


def test_fresh_parts_start_as_in_adapt(llama, tower, tmp_path):
    fusion = FusionConfig(compressor="q_former:4", gist=3)
    adapted = adapt(llama, fusion, tower).state_dict()
    convert(llama, tmp_path / "out", fusion, tower)
    fresh = {name: tensor for name, tensor in weights(tmp_path / "out").items() if name.startswith(FRESH)}
    assert fresh.keys() == {name for name in adapted if name.startswith(FRESH)}
    for name, tensor in fresh.items():
        theirs = adapted[name]
        if theirs.numel() > 256:
            assert tensor.std().item() == pytest.approx(theirs.std().item(), rel=0.3, abs=1e-6), name
        # constants, such as zero biases and the gains of norms
        elif theirs.unique().numel() == 1:
            assert torch.equal(tensor, theirs), name
        else:
            assert tensor.abs().max() < 4 * theirs.abs().max(), name
    torch.manual_seed(7)
    convert(llama, tmp_path / "one", fusion, tower)
    torch.manual_seed(7)
    convert(llama, tmp_path / "two", fusion, tower)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_shards_keep_to_their_size_and_their_index(llama, tower, tmp_path):
    convert(llama, tmp_path / "out", vision=tower, max_shard_size="16KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held, total = {}, 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(file)
        sizes = [t.numel() * t.element_size() for t in tensors.values()]
        total += sum(sizes)
        assert sum(sizes) <= 16_000 or len(sizes) == 1
        held |= dict.fromkeys(tensors, file.name)
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert held == index["weight_map"]
    assert total == index["metadata"]["total_size"]


def test_tied_weights_are_saved_once(tower, tmp_path):
    backbone = tiny_text_model(dtype=torch.float32, tie_word_embeddings=True)
    backbone.save_pretrained(tmp_path / "text")
    # some publishers save the second name too
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    doubled = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(doubled, tmp_path / "text" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "text", tmp_path / "out", vision=tower)
    assert "backbone.lm_head.weight" not in weights(tmp_path / "out")
    model = CasaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.backbone.lm_head.weight is model.backbone.model.embed_tokens.weight


def test_dtype_is_chosen_for_all_weights(llama, tower, tmp_path):
    convert(llama, tmp_path / "out", FusionConfig(gate="tanh"), tower, torch.bfloat16)
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.bfloat16}
    model = CasaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {config[part]["dtype"] for part in ("text_config", "vision_config")} | {config["dtype"]} == {"bfloat16"}
    expected = load_file(sorted(llama.glob("*.safetensors"))[0])
    name, tensor = next(iter(expected.items()))
    assert torch.equal(model.backbone.state_dict()[name], tensor.to(torch.bfloat16))


def test_tower_out_of_a_whole_model(llama, tmp_path):
    whole = tiny_backbone("qwen2_5_vl", dtype=torch.float32)
    whole.save_pretrained(tmp_path / "vlm")
    convert(llama, tmp_path / "out", vision=tmp_path / "vlm")
    model = CasaForConditionalGeneration.from_pretrained(tmp_path / "out")
    own = model.vision.state_dict()
    theirs = whole.model.visual.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


def copied(folder, target, change):
    """A copy of a one-file checkpoint with `change` made to its tensors."""
    shutil.copytree(folder, target)
    tensors = weights(target)
    for file in [*target.glob("*.safetensors"), target / "model.safetensors.index.json"]:
        file.unlink()
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def drop(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors):
    tensors["model.layers.1.extra.weight"] = torch.zeros(2)


def widen(tensors):
    tensors["model.norm.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, ["lacks 1 of its weights", "model.layers.1.mlp.up_proj.weight"]),
        (add, ["model.layers.1.extra.weight"]),
        (widen, ["model.norm.weight", "(3,)", "(32,)"]),
    ],
)
def test_weights_that_do_not_fit_are_named(change, words, llama, tower, tmp_path):
    bad = copied(llama, tmp_path / "bad", change)
    with pytest.raises(UserError) as caught:
        convert(bad, tmp_path / "out", vision=tower)
    assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_refused(llama, tower, tmp_path):
    (tmp_path / "old").mkdir()
    shutil.copy(llama / "config.json", tmp_path / "old")
    torch.save({}, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickles"):
        convert(tmp_path / "old", tmp_path / "out", vision=tower)


def test_a_missing_or_damaged_shard_is_refused(llama, tower, tmp_path):
    shutil.copytree(llama, tmp_path / "cut")
    last = sorted((tmp_path / "cut").glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-8])
    with pytest.raises(UserError, match="damaged"):
        convert(tmp_path / "cut", tmp_path / "out", vision=tower)
    last.unlink()
    with pytest.raises(UserError, match="missing"):
        convert(tmp_path / "cut", tmp_path / "out", vision=tower)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_a_damaged_index_is_refused(text, llama, tower, tmp_path):
    shutil.copytree(llama, tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json cannot be read"):
        convert(tmp_path / "bad", tmp_path / "out", vision=tower)


def test_a_folder_without_weights_is_refused(llama, tower, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(llama / "config.json", tmp_path / "bare")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        convert(tmp_path / "bare", tmp_path / "out", vision=tower)


def test_quantised_weights_are_refused(llama, tower, tmp_path):
    shutil.copytree(llama, tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantised"):
        convert(tmp_path / "q", tmp_path / "out", vision=tower)


def test_nothing_is_left_behind_by_a_conversion_that_fails(llama, tower, tmp_path):
    def fail(folder):
        assert (folder / "model.safetensors").is_file()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(llama, tmp_path / "deep" / "out", vision=tower, beside=fail)
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_empty_folder_is_filled_and_a_full_one_refused(llama, tower, tmp_path):
    (tmp_path / "out").mkdir()
    convert(llama, tmp_path / "out", vision=tower)
    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(UserError, match="exists already"):
        convert(llama, tmp_path / "out", vision=tower)
    assert sorted((tmp_path / "out").iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_towers_where_they_do_not_belong(llama, tower, tmp_path):
    with pytest.raises(UserError, match="needs an image encoder"):
        convert(llama, tmp_path / "out")
    tiny_backbone("qwen2_vl", dtype=torch.float32).save_pretrained(tmp_path / "vlm")
    with pytest.raises(UserError, match="of its own"):
        convert(tmp_path / "vlm", tmp_path / "out", vision=tower)


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("500 MB", 5 * 10**8), ("1.5KiB", 1536), ("12", 12), ("3b", 3)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0MB", "-1GB", "2XB", "two", "1e999GB"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="no size"):
        parse_size(text)


WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 4000}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8}
# tower: of the backbone, or "none" where that has one
MEASURE = """
import sys, warnings
import torch
from casa.models.convert import convert
torch.set_num_threads(1)
small, text, tower, out = sys.argv[1:]
tower = None if tower == "none" else tower
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
# what the first call imports is not the conversion's
convert(small, out + "-small", vision=tower)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
convert(text, out, vision=tower, max_shard_size="20MB")
print(status("VmHWM") - before)
"""


IN_PROC = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from /proc")


def measured(*arguments):
    """The peak of memory while a folder is converted, and the size of what comes out, both in bytes."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    written = Path(arguments[-1]).glob("*.safetensors")
    return int(run.stdout.splitlines()[-1]), sum(file.stat().st_size for file in written)


@pytest.mark.slow
@IN_PROC
def test_peak_memory_stays_below_the_models_size(llama, tower, tmp_path):
    """Every resident page counts, those mapped from the files too: the peak is about two tensors, not the model."""
    text = tiny_text_model(dtype=torch.float32, **WIDE, **HEADS)
    text.save_pretrained(tmp_path / "text", max_shard_size="15MB")
    peak, size = measured(llama, tmp_path / "text", tower, tmp_path / "out")
    assert size > 80_000_000
    assert min(len(list((tmp_path / name).glob("*.safetensors"))) for name in ("text", "out")) > 3
    # measured: 0.09 of the size; `adapt` and `save_pretrained` in its place: 1.0
    assert peak < 0.4 * size


@pytest.mark.slow
@IN_PROC
def test_an_insertion_model_of_casas_own_is_read_whole_and_once(tmp_path):
    insertion = FusionConfig(method="insertion")
    for name, shape in (("small", {}), ("own", WIDE | HEADS)):
        text = tiny_text_model(dtype=torch.float32, **shape)
        model = adapt(text, insertion, tiny_encoder(dtype=torch.float32))
        model.save_pretrained(tmp_path / name, max_shard_size="15MB")
    peak, size = measured(tmp_path / "small", tmp_path / "own", "none", tmp_path / "out")
    assert size > 80_000_000
    # measured: 1.01 of the size
    assert peak < 1.2 * size
