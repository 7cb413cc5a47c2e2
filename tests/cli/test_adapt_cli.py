"""`casa adapt`: two folders made one, a VLM taken over, and the estimate that needs no weights."""

import json

import pytest
import torch

from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.testing import tiny_backbone, tiny_checkpoint, tiny_encoder, tiny_processor, tiny_text_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A text model, a tower, and a VLM whose tokenizer and template are made up."""
    root = tmp_path_factory.mktemp("folders")
    tiny_text_model(dtype=torch.float32).save_pretrained(root / "text")
    tiny_processor().tokenizer.save_pretrained(root / "text")
    tiny_encoder(dtype=torch.float32).save_pretrained(root / "tower")
    tiny_backbone("qwen2_5_vl", dtype=torch.float32).save_pretrained(root / "vlm")
    tokenizer = tiny_processor().tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>"]})
    tokenizer.save_pretrained(root / "vlm")
    template = "{% for m in messages %}{% for p in m.content %}<|image_pad|>{% endfor %}{% endfor %}"
    (root / "vlm" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return root


def test_text_model_and_tower(casa, folders, tmp_path):
    out = tmp_path / "out"
    settings = ["--set", "layers=0,2", "--set", "gate=tanh", "--set", "output=zero", "--set", "history=-1"]
    result = casa("adapt", folders / "text", "--vision", folders / "tower", "--out", out, *settings)
    assert (result.status, result.err) == (0, "")
    assert "[0, 2]" in result.out
    model = CasaForConditionalGeneration.from_pretrained(out)
    assert model.fused_blocks == (0, 2)
    assert (model.fusion.gate, model.fusion.output, model.fusion.history) == ("tanh", "zero", -1)
    total = sum(p.numel() for p in model.parameters())
    new = sum(p.numel() for part in (model.casa_layers, model.projector) for p in part.parameters())
    assert f"{total:,} parameters, {new:,} of them new" in result.out
    assert CasaProcessor.from_pretrained(out).image_token == "<image>"


def test_vlm_brings_its_own_processor(casa, folders, tmp_path):
    out = tmp_path / "out"
    options = ["--set", "placement=before", "--compressor", "pool:2", "--dtype", "bfloat16", "--max-shard-size", "20KB"]
    result = casa("adapt", folders / "vlm", "--out", out, *options, "--set", "gist=2")
    assert (result.status, result.err) == (0, "")
    model = CasaForConditionalGeneration.from_pretrained(out)
    assert (model.fusion.placement, model.fusion.compressor, model.dtype) == ("before", "pool:2", torch.bfloat16)
    assert len(list(out.glob("*.safetensors"))) > 1
    processor = CasaProcessor.from_pretrained(out)
    assert processor.image_token == "<|image_pad|>"
    assert processor.gist_ids == [61, 62]


def test_an_insertion_model_gets_layers(casa, tmp_path):
    before = tiny_checkpoint(tmp_path / "before", method="insertion", compressor="pool:2")
    result = casa("adapt", before, "--out", tmp_path / "after", "--compressor", "pool:2")
    assert (result.status, result.err) == (0, "")
    model = CasaForConditionalGeneration.from_pretrained(tmp_path / "after")
    new = sum(p.numel() for p in model.casa_layers.parameters())
    assert f"{new:,} of them new" in result.out
    # the estimate is of what it was made of, with every method
    dry = casa("adapt", before, "--dry-run", "--json", "--image-size", 56)
    assert dry.status == 0, dry.err
    assert len(json.loads(dry.out)["methods"]) > 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{text}"], "--out"),
        (["{text}", "--out", "{new}"], "--vision"),
        (["{vlm}", "--vision", "{tower}", "--out", "{new}"], "of its own"),
        (["{tower}", "--vision", "{tower}", "--out", "{new}"], "not a model that casa knows"),
        (["{text}", "--vision", "{text}", "--out", "{new}"], "no image encoder that casa knows"),
        (["{vlm}", "--out", "{new}", "--set", "plaecment=before"], "'placement'"),
        (["{vlm}", "--out", "{new}", "--set", "every"], "--set every=4"),
        (["{vlm}", "--out", "{new}", "--set", "every=two"], "whole number"),
        (["{vlm}", "--out", "{new}", "--set", "update_images=1"], "true or false"),
        (["{vlm}", "--out", "{new}", "--every", "2", "--set", "every=3"], "given twice"),
        (["{vlm}", "--out", "{new}", "--compressor", "pool:2", "--compressor", "pool:3"], "one compressor"),
        (["{vlm}", "--out", "{new}", "--dtype", "int8"], "bfloat16"),
        (["{vlm}", "--out", "{new}", "--max-shard-size", "big"], "2GB"),
        (["{vlm}", "--out", "{vlm}"], "exists already"),
        (["{vlm}", "--out", "{new}", "--json"], "--dry-run"),
        (["--dry-run"], "helium-2b"),
        (["--dry-run", "--shape", "helium-9b"], "helium-2b"),
        (["{vlm}", "--dry-run", "--shape", "helium-2b"], "--shape"),
        (["{vlm}", "--dry-run", "--image-size", "1x2x3"], "HEIGHTxWIDTH"),
        (["{vlm}", "--dry-run", "--image-size", "10"], "less than one image token"),
        (["{vlm}", "--dry-run", "--frames", "1,,2"], "whole numbers"),
        (["{vlm}", "--dry-run", "--frames", "0"], "1 or more"),
        (["{vlm}", "--dry-run", "--compressor", "squeeze:2"], "squeeze"),
        (["{vlm}", "--dry-run", "--out", "{new}"], "must name a .json file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_makes_no_sense_is_refused(casa, folders, tmp_path, arguments, words):
    paths = {name: folders / name for name in ("text", "tower", "vlm")} | {"new": tmp_path / "new"}
    result = casa("adapt", *(argument.format(**paths) for argument in arguments))
    assert result.status == 2
    assert words in result.err
    assert len(result.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_one_json_object(casa, folders):
    settings = ["--compressor", "pool:2", "--image-size", "56x84", "--frames", "3", "--text-per-frame", "7"]
    result = casa("adapt", folders / "vlm", "--dry-run", "--json", "--set", "every=2", *settings)
    assert (result.status, result.err) == (0, "")
    found = json.loads(result.out)
    assert found["scene"] == {"image_size": [56, 84], "frames": [3], "text_per_frame": 7, "dtype": "bfloat16"}
    methods = {method["name"]: method for method in found["methods"]}
    assert {"insertion", "CASA ⊕", "CASA ⊕, pool:2", "cross-attention, tanh", "yours"} <= methods.keys()
    casa_plain, insertion = methods["CASA ⊕"], methods["insertion"]
    assert casa_plain["frame_tokens"] == 6
    assert casa_plain["moments"][0]["cache_bytes"] < insertion["moments"][0]["cache_bytes"]
    assert methods["yours"]["fusion"]["every"] == 2
    assert casa_plain["parameters"] == insertion["parameters"] + casa_plain["parts"]["casa_layers"]


def test_dry_run_prints_tables_and_needs_no_weights(casa, tmp_path, folders):
    (tmp_path / "config.json").write_text((folders / "text" / "config.json").read_text())
    for path in (tmp_path, tmp_path / "config.json"):
        result = casa("adapt", path, "--dry-run", "--vision", folders / "tower", "--image-size", 56)
        assert (result.status, result.err) == (0, "")
        assert result.out.count("CASA ⊕, shared (D1)") == 3
        assert "after 256 frames" in result.out
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_dry_run_of_a_published_shape(casa, tmp_path):
    file = tmp_path / "figures.json"
    result = casa("adapt", "--dry-run", "--shape", "qwen2_5-vl-7b", "--json", "--out", file)
    assert result.status == 0
    found = json.loads(result.out)
    insertion = found["methods"][0]
    assert insertion["parameters"] == 8_292_166_656
    assert insertion["frame_tokens"] == 1024
    assert json.loads(file.read_text()) == found
    assert found["versions"]["torch"] == torch.__version__
    assert found["dry_run"] == "qwen2_5-vl-7b"
