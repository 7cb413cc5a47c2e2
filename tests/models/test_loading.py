"""Save and load: bit for bit; damaged or foreign checkpoints are refused in one plain sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from casa import CasaConfig, CasaForConditionalGeneration, CasaProcessor, FusionConfig, adapt
from casa.errors import UserError
from casa.models import loading
from casa.models.loading import read_config, sentence_of
from casa.testing import TinySample, tiny_casa, tiny_encoder, tiny_processor, tiny_text_model

SAMPLE = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)))


def logits(model):
    """Parameters are cloned: those that lie in a file's memory are aligned differently, which moves the last bit."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        return model.eval()(**SAMPLE.inputs()).logits


@pytest.fixture
def folder(tmp_path):
    tiny_casa().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("shards", ["5GB", "20KB"], ids=["one file", "sharded"])
def test_loaded_is_saved_bit_for_bit(few, tmp_path, shards):
    few.save_pretrained(tmp_path, max_shard_size=shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shards == "20KB"
    assert not list(tmp_path.glob("*.bin"))
    loaded = CasaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.fusion == few.fusion
    assert loaded.state_dict().keys() == few.state_dict().keys()
    assert all(torch.equal(t, few.state_dict()[name]) for name, t in loaded.state_dict().items())
    assert torch.equal(logits(loaded), logits(few))


def test_auto_classes_find_it(folder):
    assert isinstance(AutoConfig.from_pretrained(folder), CasaConfig)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(model, CasaForConditionalGeneration)
    assert torch.equal(logits(model), logits(tiny_casa()))
    assert isinstance(AutoModelForImageTextToText.from_config(model.config), CasaForConditionalGeneration)


def test_tied_embeddings_stay_tied(tmp_path):
    model = adapt(tiny_text_model(tie_word_embeddings=True), FusionConfig(), vision=tiny_encoder())
    model.save_pretrained(tmp_path)
    assert "backbone.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = CasaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_config_reads_back_and_refuses_unknown_fusion(folder):
    assert CasaConfig.from_pretrained(folder).typed_fusion == FusionConfig()
    with pytest.raises(UserError, match="did you mean 'history'"):
        CasaConfig(fusion={"histroy": 1})
    with pytest.raises(UserError, match="'nothing' is not one"):
        CasaConfig(text_config={"model_type": "nothing"})


def rewrite_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2000])


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGE = {
    "missing": (
        lambda f: rewrite_weights(f, lambda t: t.pop("casa_layers.1.o_proj.weight")),
        "1 are missing from it, the first is casa_layers.1.o_proj.weight",
    ),
    "surplus": (
        lambda f: rewrite_weights(f, lambda t: t.update(extra=torch.zeros(1))),
        "1 are in it and not in the model, the first is extra",
    ),
    "misshapen": (
        lambda f: rewrite_weights(f, lambda t: t.update({"projector.up.bias": torch.zeros(3)})),
        "1 have another shape in it, the first is projector.up.bias",
    ),
    "cut off": (cut_off, "cannot be loaded: .*[Hh]eader"),
    "text for weights": (lambda f: (f / "model.safetensors").write_text("hello"), "cannot be loaded: .*header"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "pickle only": (pickled, "no file named model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config cut off": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
    "fusion key": (lambda f: rewrite_config(f, lambda c: c["fusion"].update(histroy=1)), "did you mean 'history'"),
    "other family": (lambda f: rewrite_config(f, lambda c: c["text_config"].update(model_type="gpt2")), "Known: "),
    "value": (lambda f: rewrite_config(f, lambda c: c["text_config"].update(hidden_size="x")), "hidden_size"),
    "not casa": (lambda f: rewrite_config(f, lambda c: c.update(model_type="llama")), "make one of it with adapt"),
    "other fusion": (
        lambda f: rewrite_config(f, lambda c: c["fusion"].update(share_weights=True)),
        "21|12 are in it and not in the model",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_refused_in_one_sentence(folder, damage):
    spoil, words = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(UserError, match=words) as refusal:
        CasaForConditionalGeneration.from_pretrained(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(), "OSError"),
        (ValueError(" \n "), "ValueError"),
        (ValueError("\nit is cut off\nsee above"), "it is cut off"),
        (TypeError("the field is wrong:\n    it is a text"), "the field is wrong: it is a text"),
    ],
)
def test_an_error_in_one_sentence(error, sentence):
    assert sentence_of(error) == sentence


def test_an_error_without_words_is_told_by_its_kind(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")

    def fail(*_, **__):
        raise ImportError

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(UserError, match="cannot be read: ImportError"):
        read_config(tmp_path)


def test_paths_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no model at"):
        CasaForConditionalGeneration.from_pretrained(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; give the folder"):
        CasaForConditionalGeneration.from_pretrained(tmp_path / "file")
    with pytest.raises(UserError, match="there is no model at"):
        CasaForConditionalGeneration.from_pretrained("casa-huge")


def test_a_shipped_model_without_its_weights_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "ASSETS", tmp_path)
    (tmp_path / "casa-tiny").mkdir()
    assert loading.shipped() == ["casa-tiny"]
    for read in (CasaForConditionalGeneration, CasaProcessor, CasaConfig):
        with pytest.raises(UserError, match="this copy of casa is without the weights of casa-smol"):
            read.from_pretrained("casa-smol")


def test_no_code_of_a_checkpoint_runs(folder):
    """A checkpoint that names a module of its own is loaded by casa's classes; its module is never imported."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    names = {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"}
    rewrite_config(folder, lambda c: c.update(auto_map=names))
    CasaForConditionalGeneration.from_pretrained(folder)
    AutoModelForImageTextToText.from_pretrained(folder)
    with pytest.raises(UserError, match="runs no code"):
        CasaForConditionalGeneration.from_pretrained(folder, trust_remote_code=True)
    assert not (folder / "ran").exists()


def test_no_code_of_a_processor_or_a_backbone_runs(tmp_path):
    names = dict.fromkeys(("AutoConfig", "AutoProcessor", "AutoImageProcessor", "AutoModelForCausalLM"), "evil.Evil")
    names["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    tiny_processor().save_pretrained(tmp_path)
    tiny_text_model(dtype=torch.float32).save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "preprocessor_config.json"):
        path = tmp_path / name
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(values | {"auto_map": names}))
    assert CasaProcessor.from_pretrained(tmp_path).stream_prompt == "say it"
    adapt(str(tmp_path), vision=tiny_encoder(dtype=torch.float32))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_brings_its_class_is_refused_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: "y")
    tiny_processor().save_pretrained(tmp_path)
    tiny_casa().config.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    path = tmp_path / "tokenizer_config.json"
    named = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    with pytest.raises(UserError, match=r"no processor that can be read .*custom code"):
        CasaProcessor.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="runs no code"):
        CasaProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert not (tmp_path / "ran").exists()
