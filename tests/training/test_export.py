"""Checkpoints of either kind become model folders; what is no checkpoint is refused in a sentence."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from casa import CasaForConditionalGeneration
from casa.errors import UserError
from casa.testing import tiny_casa, tiny_processor
from casa.training.checkpoints import EMA_FILE, Ema
from casa.training.fsdp import read_moments, read_weights, write_shards
from casa.training.models import export_checkpoint

alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def ended(folder, model):
    """Adds what every checkpoint has."""
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "rng_state.pth").write_bytes(b"")
    tiny_processor().save_pretrained(folder)
    return folder


def trained_a_little(dtype=torch.float32, **text):
    model = tiny_casa(dtype=dtype)
    if text.get("tie"):
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.backbone.config.tie_word_embeddings = True
        model.backbone.lm_head.weight = model.backbone.model.embed_tokens.weight
    ema = Ema(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    ema.update()
    return model, ema


def logits(model):
    """Of a picture and some text."""
    seen = tiny_processor()(images=[Image.new("RGB", (56, 28), "red")], text="<image>0123", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**seen).logits


def same(folder, wanted, dtype=None):
    found = CasaForConditionalGeneration.from_pretrained(folder)
    named = dict(found.named_parameters())
    assert named.keys() == wanted.keys()
    for name, value in wanted.items():
        kept = value.to(dtype) if dtype is not None else value
        assert named[name].dtype == kept.dtype
        assert torch.equal(named[name], kept), name


@pytest.mark.slow
def test_a_model_folder_loses_the_state_of_its_run(tmp_path):
    model, ema = trained_a_little()
    checkpoint = tmp_path / "checkpoint-3"
    model.save_pretrained(checkpoint)
    save_file(ema.state_dict(), ended(checkpoint, model) / EMA_FILE)
    out = export_checkpoint(checkpoint, tmp_path / "out")
    same(out, dict(model.named_parameters()))
    same(export_checkpoint(checkpoint, tmp_path / "average", average=True), ema.average)
    left = {path.name for path in out.iterdir()}
    assert "model.safetensors" in left
    assert not left & {"trainer_state.json", "rng_state.pth", EMA_FILE}


@pytest.mark.slow
@alone
@pytest.mark.parametrize(("dtype", "tie"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_shards_are_joined(tmp_path, monkeypatch, dtype, tie):
    model, ema = trained_a_little(dtype, tie=tie)
    optimiser = torch.optim.AdamW(model.parameters())
    checkpoint = tmp_path / "checkpoint-3"
    model.config.save_pretrained(ended(checkpoint, model))
    write_shards(checkpoint, model, optimiser, ema)
    devices, load = set(), CasaForConditionalGeneration.load_state_dict

    def watched(outline, *args, **kwargs):
        devices.update(parameter.device.type for parameter in outline.parameters())
        return load(outline, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(CasaForConditionalGeneration, "load_state_dict", watched)
        out = export_checkpoint(checkpoint, tmp_path / "out")
    # the weights are in memory once: what they are put into is an outline
    assert devices == {"meta"}
    same(out, dict(model.named_parameters()))
    found = CasaForConditionalGeneration.from_pretrained(out, dtype=dtype)
    assert torch.equal(logits(found), logits(model))
    # averages are kept in float32, and given in the model's own
    same(export_checkpoint(checkpoint, tmp_path / "average", average=True), ema.average, dtype)


@pytest.mark.slow
@alone
def test_another_dtype_and_no_average(tmp_path):
    model, _ = trained_a_little()
    checkpoint = tmp_path / "checkpoint-3"
    model.config.save_pretrained(ended(checkpoint, model))
    write_shards(checkpoint, model, torch.optim.AdamW(model.parameters()))
    out = export_checkpoint(checkpoint, tmp_path / "out", dtype=torch.bfloat16)
    found = CasaForConditionalGeneration.from_pretrained(out, dtype="auto")
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    with pytest.raises(UserError, match="no running average"):
        export_checkpoint(checkpoint, tmp_path / "other", average=True)
    assert not (tmp_path / "other").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@alone
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "damaged|lacks a part"),
        (lambda folder: cut(next(folder.glob("*.safetensors"))), "damaged|cannot be read"),
        (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b""), "damaged"),
        (lambda folder: (folder / "processes.json").unlink(), "damaged"),
        (lambda folder: (folder / "processes.json").write_text("not JSON"), "damaged"),
        (lambda folder: (folder / "processes.json").write_text("2"), "lacks a part"),
    ],
    ids=["missing", "cut", "empty", "no count", "broken count", "of two processes"],
)
def test_shards_that_are_damaged_or_missing_are_refused(tmp_path, damage, words):
    model, ema = trained_a_little()
    optimiser = torch.optim.AdamW(model.parameters())
    checkpoint = tmp_path / "checkpoint-3"
    model.config.save_pretrained(ended(checkpoint, model))
    write_shards(checkpoint, model, optimiser, ema)
    damage(checkpoint / "sharded")
    for read in (
        lambda: export_checkpoint(checkpoint, tmp_path / "out"),
        lambda: read_weights(checkpoint, model, ema),
        lambda: read_moments(checkpoint, model, optimiser),
    ):
        with pytest.raises(UserError, match=f"({words}).*another checkpoint"):
            read()
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="no checkpoint of a run"):
        export_checkpoint(tmp_path, tmp_path / "out")
    for step in (20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(UserError, match=r"is a run: give one .*checkpoint-100"):
        export_checkpoint(tmp_path, tmp_path / "out")
    hidden = tmp_path / ".unfinished-checkpoint-7"
    hidden.mkdir()
    with pytest.raises(UserError, match="never finished"):
        export_checkpoint(hidden, tmp_path / "out")
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-20" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="LoRA"):
        export_checkpoint(tmp_path / "checkpoint-20", tmp_path / "out")
    assert not (tmp_path / "out").exists()
