"""The paper's variants beyond placement: image updates, silent starts, gist tokens, compressed images."""

from typing import Any

import pytest
import torch
from PIL import Image

from casa import FusionConfig, adapt
from casa.errors import UserError
from casa.models.backbones import decoder_of
from casa.models.passes import ImageTokens, images_by_depth
from casa.testing import (
    BACKBONES,
    TinySample,
    as_batch,
    as_packed,
    tiny_backbone,
    tiny_casa,
    tiny_casa_over,
    tiny_encoder,
    tiny_processor,
)

SAMPLES = (
    TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 3, 3), (5, 4, 2)), seed=10),
    TinySample((7, 30, 11, 12), (), seed=20),
    TinySample((40, 6, 13, 22, 50), ((0, 2, 5), (0, 1, 1), (3, 3, 1)), seed=30),
)
VARIANTS = {
    "updated": {"update_images": True},
    "updated cross": {"update_images": True, "method": "cross_attention", "every": 2},
    "pooled": {"compressor": "pool:2"},
    "shuffled before": {"compressor": "pixel_shuffle:2", "placement": "before"},
    "linear": {"projector": "linear"},
    "queried": {"compressor": "q_former:3"},
    "queried history": {"compressor": "q_former:3", "history": 1},
    "pooled insertion": {"compressor": "pool:2", "method": "insertion"},
    "shuffled insertion": {"compressor": "pixel_shuffle:2", "method": "insertion"},
    "queried insertion": {"compressor": "q_former:3", "method": "insertion"},
    "pooled replace in sample": {"compressor": "pool:2", "placement": "replace", "every": 2, "split": "sample"},
}


@pytest.fixture(params=VARIANTS, scope="module")
def model(request):
    return tiny_casa(**VARIANTS[request.param])


@pytest.mark.slow
@torch.no_grad()
def test_packed_padded_and_in_pieces_are_each_sample_alone(model, close):
    alone = [model(**sample.inputs()).logits[0] for sample in SAMPLES]
    close(model(**as_packed(SAMPLES)).logits[0], torch.cat(alone))
    for row, sample, wanted in zip(model(**as_batch(SAMPLES)).logits, SAMPLES, alone, strict=True):
        close(row[-len(sample.ids) :], wanted)
    for sample, wanted in zip(SAMPLES, alone, strict=True):
        cache, found = None, []
        for call in sample.calls([1, 2, 3]):
            output = model(**call, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits[0])
        close(torch.cat(found), wanted)


@torch.no_grad()
def test_queried_images_in_the_stream_have_places_in_three_axes_too(close):
    """The image tokens of a Q-Former stand in one row; so they are placed under mRoPE, whatever hands them over."""
    model = tiny_casa_over("qwen2_5_vl", method="insertion", compressor="q_former:3")
    test_packed_padded_and_in_pieces_are_each_sample_alone(model, close)


@pytest.mark.slow
@torch.no_grad()
def test_they_generate_and_come_back_from_disk(model, tmp_path):
    inputs = SAMPLES[0].inputs()
    said = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(again.generate(**inputs, max_new_tokens=3, do_sample=False), said)


@torch.no_grad()
def test_image_tokens_are_updated_by_each_blocks_feed_forward_network():
    model = tiny_casa(update_images=True)
    decoder, tokens = model.decoder, torch.randn(5, 32, dtype=torch.float64)
    first, second, third = images_by_depth(ImageTokens(tokens), decoder, [0, 1, 2], update=True)
    block: Any = decoder.blocks[0]
    assert first is tokens
    torch.testing.assert_close(second, tokens + block.mlp(block.post_attention_layernorm(tokens)))
    assert not torch.equal(second, third)
    same = images_by_depth(ImageTokens(tokens), decoder, [0, 1, 2], update=False)
    assert all(found is tokens for found in same), "one tensor, so that all layers share one product"


@pytest.mark.parametrize("kind", BACKBONES)
@torch.no_grad()
def test_updates_are_the_blocks_own_feed_forward(kind):
    """A block whose self-attention gives nothing is x + FFN(x), all of its norms included."""
    decoder = decoder_of(tiny_backbone(kind))
    for parameter in decoder.attention(0).get_submodule("o_proj").parameters():
        parameter.zero_()
    tokens, given = torch.randn(5, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64), []
    decoder.blocks[0].register_forward_hook(lambda block, args, output: given.append(output))
    decoder.stack(inputs_embeds=tokens[None], position_ids=decoder.text_positions(torch.arange(5)[None]))
    update = decoder.feed_forward(0, tokens)
    assert float(update.abs().max()) > 1e-2
    torch.testing.assert_close(tokens + update, given[0][0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_updating_images_changes_only_layers_above_the_first():
    still, updated = (tiny_casa(layers=[0], update_images=update) for update in (False, True))
    inputs = SAMPLES[0].inputs()
    assert torch.equal(still(**inputs).logits, updated(**inputs).logits)
    still, updated = (tiny_casa(layers=[2], update_images=update) for update in (False, True))
    assert float((still(**inputs).logits - updated(**inputs).logits).abs().max()) > 1e-4


@pytest.mark.parametrize("placement", ["parallel", "before"])
@torch.no_grad()
def test_a_silent_start_leaves_the_text_as_it_was(placement):
    backbone = tiny_backbone("qwen2")
    wanted = backbone(input_ids=SAMPLES[0].inputs()["input_ids"]).logits
    model = adapt(backbone, FusionConfig(output="zero", placement=placement), vision=tiny_encoder()).eval()
    assert torch.equal(model(**SAMPLES[0].inputs()).logits, wanted)
    layer: Any = model.casa_layers["0"]
    copied: Any = model.decoder.attention(0)
    assert torch.equal(layer.q_proj.weight, copied.q_proj.weight), "the rest is copied"


def test_a_silent_start_learns():
    model: Any = adapt(tiny_backbone("llama"), FusionConfig(output="zero"), vision=tiny_encoder())
    model(**SAMPLES[0].inputs(), labels=SAMPLES[0].inputs()["input_ids"], use_cache=False).loss.backward()
    assert float(model.casa_layers["0"].o_proj.weight.grad.abs().max()) > 0


@torch.no_grad()
def test_compressed_images_take_fewer_tokens():
    inputs = SAMPLES[0].inputs()  # 3 x 3 and 4 x 2
    counts = {None: 8, "pool:2": 2, "pixel_shuffle:2": 2, "q_former:3": 3}
    for compressor, left in counts.items():
        cache = tiny_casa(compressor=compressor)(**inputs, use_cache=True).past_key_values
        assert cache.image_tokens == left, "of the visible window, which is the last"
    for compressor, left in {None: 17, "pool:2": 4 + 2, "q_former:3": 6}.items():
        cache = tiny_casa(method="insertion", compressor=compressor)(**inputs, use_cache=True).past_key_values
        assert cache.image_tokens == left


def test_compressors_are_trained_with_the_rest():
    for compressor in ("pixel_shuffle:2", "q_former:2"):
        model = tiny_casa(compressor=compressor)
        model(**SAMPLES[0].inputs(), labels=SAMPLES[0].inputs()["input_ids"], use_cache=False).loss.backward()
        for name, parameter in model.compressor.named_parameters():
            assert parameter.grad is not None, name


class TestGist:
    def inputs(self, model, processor):
        picture = Image.new("RGB", (84, 56), (200, 40, 40))
        return processor(images=[picture], text="hi <image> there", return_tensors="pt").to(model.device)

    def model_and_processor(self, n):
        model, processor = tiny_casa(gist=n, dtype=torch.float32), tiny_processor()
        processor.gist_ids = model.gist_ids
        return model, processor

    @torch.no_grad()
    def test_the_processor_writes_them_behind_every_picture(self):
        model, processor = self.model_and_processor(3)
        plain, gist = self.inputs(model, tiny_processor()), self.inputs(model, processor)
        place = int(plain["image_positions"][0, 1])
        assert gist["image_positions"].tolist() == plain["image_positions"].tolist()
        wanted = [*plain["input_ids"][0, :place], 61, 62, 63, *plain["input_ids"][0, place:]]
        assert gist["input_ids"][0].tolist() == [int(token) for token in wanted]
        _, after, _ = processor.frame(torch.zeros(56, 56, 3, dtype=torch.uint8).numpy())
        assert after[:3] == [61, 62, 63]

    @torch.no_grad()
    def test_they_have_embeddings_of_their_own_and_stay_in_the_text_cache(self):
        model, processor = self.model_and_processor(3)
        inputs = self.inputs(model, processor)
        before = model(**inputs, use_cache=True)
        assert before.logits.shape[-1] == 61, "nobody says them"
        assert before.past_key_values.text.get_seq_length() == inputs["input_ids"].shape[1]
        model.gist.weight += 1.0
        after = model(**inputs).logits
        place = int(inputs["image_positions"][0, 1])
        changed = (after - before.logits)[0].abs().amax(-1)
        assert float(changed[:place].max()) == 0
        assert float(changed[place:].min()) > 0

    @torch.no_grad()
    def test_a_later_window_sees_a_picture_through_them(self):
        """The picture itself is out of sight in the second window; its gist tokens are not."""
        model, _ = self.model_and_processor(2)
        ids = [5, *model.gist_ids, 9, *model.gist_ids, 4]
        sample = TinySample(tuple(ids), ((1, 2, 2), (4, 1, 2)), seed=1)
        other = TinySample(tuple(ids), ((1, 2, 2), (4, 1, 2)), seed=1)
        one, two = sample.inputs(), other.inputs()
        two["pixel_values"] = two["pixel_values"].clone()
        two["pixel_values"][:16] += 1.0  # the first picture
        one, two = ({k: v.float() if v.is_floating_point() else v for k, v in i.items()} for i in (one, two))
        assert float((model(**one).logits - model(**two).logits)[0, -1].abs().max()) > 1e-4

    @torch.no_grad()
    def test_the_templates_own_delimiter_behind_a_picture_does_the_same(self):
        """The other kind of gist token (paper v2): the delimiter is text of the picture's window and stays cached."""
        model, processor = tiny_casa(dtype=torch.float32), tiny_processor()
        delimiter = processor.tokenizer.convert_tokens_to_ids("<frame>")
        chat = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (84, 56))}]}]
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        row, place = inputs["image_positions"][0].tolist()
        assert inputs["input_ids"][row, place] == delimiter, "the picture stands right before it"
        before, after, _ = processor.frame(torch.zeros(56, 56, 3, dtype=torch.uint8).numpy())
        assert (list(before), list(after)) == ([], [delimiter])
        # a first picture with nothing but its delimiter behind it, then another and a word
        sample = TinySample((5, delimiter, delimiter, 4), ((1, 2, 2), (2, 1, 2)), seed=1)
        one, two = sample.inputs(), sample.inputs()
        two["pixel_values"] = two["pixel_values"].clone()
        two["pixel_values"][:16] += 1.0  # the first picture
        one, two = ({k: v.float() if v.is_floating_point() else v for k, v in i.items()} for i in (one, two))
        moved = (model(**one).logits - model(**two).logits)[0].abs().amax(-1)
        assert float(moved[0]) == 0
        assert float(moved[1:].min()) > 1e-4
        cache = model(**one, use_cache=True).past_key_values
        assert (cache.num_text, cache.image_tokens) == (4, 2), "two of six image tokens are left, and both delimiters"

    def test_it_learns_and_is_saved(self, tmp_path):
        model: Any
        model, processor = self.model_and_processor(2)
        inputs = self.inputs(model, processor)
        model(**inputs, labels=inputs["input_ids"].clamp(max=60), use_cache=False).loss.backward()
        assert float(model.gist.weight.grad.abs().max()) > 0
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert torch.equal(again.gist.weight, model.gist.weight)
        assert type(processor).from_pretrained(tmp_path).gist_ids == [61, 62]


@pytest.mark.parametrize(
    ("fusion", "words"),
    [
        ({"output": "zeros"}, "did you mean 'zero'"),
        ({"output": "zero", "share_weights": True}, "weights of their own"),
        ({"method": "insertion", "update_images": True}, "leave out update_images"),
        ({"gist": -1}, "it must be 0 or more"),
        ({"compressor": "pol:2"}, "pool"),
        ({"compressor": "pool"}, "pool:2"),
    ],
)
def test_what_makes_no_sense_is_refused(fusion, words):
    with pytest.raises(UserError, match=words):
        FusionConfig(**fusion)


@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        (FusionConfig.parallel(gate="tanh"), {"placement": "parallel", "gate": "tanh"}),
        (FusionConfig.before(history=1), {"placement": "before", "history": 1}),
        (FusionConfig.replace(), {"placement": "replace", "every": 4}),
        (FusionConfig.replace(every=2, split="sample"), {"placement": "replace", "every": 2, "split": "sample"}),
        (FusionConfig.cross_attention(placement="before"), {"method": "cross_attention", "placement": "before"}),
        (FusionConfig.insertion(compressor="pool:2"), {"method": "insertion", "compressor": "pool:2"}),
    ],
)
def test_presets_are_the_usual_ones(preset, fields):
    assert preset == FusionConfig(**fields)


def test_a_preset_refuses_an_unknown_value():
    with pytest.raises(UserError, match="gate is 'tan'; did you mean 'tanh'"):
        FusionConfig.parallel(gate="tan")
