"""Language models in GGUF files: adapted like their own plain weights, from the model, the file or its folder."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from casa import CasaForConditionalGeneration, CasaProcessor, FusionConfig, adapt
from casa.cli.main import run
from casa.errors import UserError
from casa.models import loading
from casa.models.auto import auto_processor
from casa.models.backbone_source import load_backbone
from casa.models.convert import convert
from casa.models.gguf import llama_weights
from casa.testing import TinySample, tiny_encoder, tiny_text_model
from casa.testing.tiny import spread

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

SAMPLE = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)))
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
WORDS = ["<pad>", "<bos>", "<end>", *"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRS", "ab", "cd", "\u0120"]


def text_model(kind="llama"):
    if kind == "llama":
        return tiny_text_model(dtype=torch.float32, intermediate_size=64)
    like = tiny_text_model().config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = Qwen2Config(**{name: getattr(like, name) for name in names}, intermediate_size=64)
    torch.manual_seed(3)
    return spread(Qwen2ForCausalLM(config)).eval()


def turned(weight, heads):
    """Rotary halves as llama.cpp has them: neighbours."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(path, model, packed=None):
    """A model as a GGUF file, its matrices quantised if `packed` names a type."""
    config, kind = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, tensor in model.state_dict().items():
        weight = tensor.float().numpy()
        if name in WHOLE:
            found = WHOLE[name]
        else:
            _, _, block, inner = name.split(".", 3)
            inner, part = inner.rsplit(".", 1)
            found = f"blk.{block}.{NAMES[inner]}.{part}"
            if kind == "llama" and inner.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if inner.endswith("q_proj") else config.num_key_value_heads
                weight = turned(weight, heads)
        if packed is not None and weight.ndim == 2:
            writer.add_tensor(found, gguf.quants.quantize(weight, packed), raw_dtype=packed)
        else:
            writer.add_tensor(found, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def plain(request):
    return text_model(request.param)


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory):
    """With that model in one file, as it is."""
    folder = tmp_path_factory.mktemp("gguf")
    write(folder / "tiny.gguf", plain)
    return folder


def inputs():
    return {k: v.float() if v.is_floating_point() else v for k, v in SAMPLE.inputs().items()}


@torch.no_grad()
def logits(model):
    return model(**inputs()).logits


def with_eyes(backbone, **fusion):
    torch.manual_seed(5)
    return adapt(backbone, FusionConfig(**fusion), vision=tiny_encoder(dtype=torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("given", ["model", "file", "folder"])
@pytest.mark.parametrize("fusion", [{}, {"placement": "replace", "every": 2}], ids=str)
def test_it_is_the_model_of_its_plain_weights(plain, folder, tmp_path, given, fusion):
    backbone = {
        "model": lambda: AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf"),
        "file": lambda: str(folder / "tiny.gguf"),
        "folder": lambda: folder,
    }[given]()
    model = with_eyes(backbone, **fusion)
    assert type(model.backbone) is type(plain)
    assert not model.training
    for name, weight in plain.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], weight), name
    with torch.no_grad():
        ids = torch.tensor([SAMPLE.ids])
        if not fusion:
            torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    # and nothing of the file is left in it
    assert not getattr(model.backbone, "is_quantized", False)
    assert "quantization" not in json.dumps(model.config.to_dict())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(CasaForConditionalGeneration.from_pretrained(tmp_path)), logits(model))
    model.train()(**inputs(), labels=inputs()["input_ids"]).loss.backward()
    assert model.backbone.model.layers[0].mlp.up_proj.weight.grad.any()


@pytest.mark.slow
@pytest.mark.parametrize("packed", ["Q8_0", "Q4_1"])
def test_packed_weights_are_unpacked(plain, tmp_path, packed):
    kind = gguf.GGMLQuantizationType[packed]
    model = with_eyes(write(tmp_path / "small.gguf", plain, kind))
    for name, weight in plain.state_dict().items():
        if weight.dim() == 2 and not name.endswith(("q_proj.weight", "k_proj.weight")):
            wanted = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
            assert torch.equal(model.backbone.state_dict()[name], torch.tensor(wanted)), name
    found = logits(model)
    for out, settings in (("out", {}), ("added", {"added_only": True})):
        model.save_pretrained(tmp_path / out, **settings)
        assert torch.equal(logits(CasaForConditionalGeneration.from_pretrained(tmp_path / out)), found)
    sizes = [(tmp_path / out / "model.safetensors").stat().st_size for out in ("out", "added")]
    assert sizes[1] < 0.8 * sizes[0]


@pytest.mark.parametrize("packed", [None, "Q8_0", "Q4_1", "Q4_0"])
def test_read_by_itself_it_is_what_transformers_reads(tmp_path, packed):
    kind = packed and gguf.GGMLQuantizationType[packed]
    file = write(tmp_path / "small.gguf", text_model(), kind)
    found = llama_weights(file)
    if packed == "Q4_0":  # left to transformers
        assert found is None
        return
    wanted = load_backbone(file).state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name
    whole = file.read_bytes()
    for end in (0, 3, 200, 1500, len(whole) // 2, len(whole) - 300):
        file.write_bytes(whole[:end])
        assert llama_weights(file) is None, end
    assert llama_weights(write(tmp_path / "other.gguf", text_model("qwen2"))) is None


def test_weights_that_are_still_packed_are_refused(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf")
    if not getattr(model, "is_quantized", False):
        pytest.skip("this transformers hands out GGUF models as plain ones")
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(3, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(UserError, match=r"GGUF weights are packed.*GgufConfig\(dequantize=True\)"):
        with_eyes(model)


@pytest.mark.slow
def test_the_command_makes_a_folder_with_model_and_processor(plain, folder, tmp_path, monkeypatch, capsys):
    tower = tmp_path / "tower"
    tiny_encoder(dtype=torch.float32).save_pretrained(tower)
    out = tmp_path / "out"
    monkeypatch.setattr(
        "sys.argv", ["casa", "adapt", str(folder / "tiny.gguf"), "--vision", str(tower), "--out", str(out)]
    )
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code in (0, None), capsys.readouterr().err
    assert "blocks with a fusion layer: [0, 1, 2]" in capsys.readouterr().out
    model, processor = CasaForConditionalGeneration.from_pretrained(out), CasaProcessor.from_pretrained(out)
    for name, weight in plain.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], weight), name
    # its merges too
    ids = processor.tokenizer.encode("abc", add_special_tokens=False)
    assert processor.tokenizer.convert_ids_to_tokens(ids) == ["ab", "c"]
    half = convert(folder, tmp_path / "half", vision=tower, dtype=torch.bfloat16)
    assert half.device.type == "meta"
    assert CasaForConditionalGeneration.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    monkeypatch.setattr(
        "sys.argv", ["casa", "adapt", str(folder), "--vision", str(tower), "--dry-run", "--image-size", "56"]
    )
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code in (0, None), capsys.readouterr().err


def test_what_cannot_be_read_says_what_to_do(folder, tmp_path, monkeypatch):
    file = folder / "tiny.gguf"
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(b"GGUF")
    part = tmp_path / "big-00001-of-00002.gguf"
    part.write_bytes(b"GGUF")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:9000])
    other = tmp_path / "other.gguf"
    other.write_bytes(b"no such thing")
    for given, words in (
        (tmp_path / "two", "several GGUF files; give the path of one: a.gguf, b.gguf"),
        (part, "one part of several; join them first"),
        (cut, "cut.gguf cannot be loaded: cannot reshape array"),
        (other, r"other.gguf (cannot be loaded|has no GGUF weights that can be read)"),
        (tmp_path / "none.gguf", "there is no model at"),
    ):
        with pytest.raises(UserError, match=words):
            with_eyes(given)
        with pytest.raises(UserError):
            convert(given, tmp_path / "out", vision=folder)
        with pytest.raises(UserError):
            auto_processor(given, folder)
    with pytest.raises(UserError, match="a language model without eyes; adapt it"):
        CasaForConditionalGeneration.from_pretrained(file)
    with pytest.raises(UserError, match="text-only model needs an image encoder"):
        adapt(file)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs gguf and accelerate: install casa-vlm\[gguf\]"):
        with_eyes(file)
