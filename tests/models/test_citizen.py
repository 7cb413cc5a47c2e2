"""What anyone who knows transformers expects of a model: its outputs, its arguments, its bookkeeping.

transformers' wheel ships no common test mixin for models (those are in its repository only), so this asks, in our
own words and for every family, what matters of what such a mixin asks.
"""

import copy
import pickle

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from casa import CasaForConditionalGeneration, adapt
from casa.errors import UserError
from casa.testing import BACKBONES, TinySample, as_batch, tiny_casa, tiny_casa_over, tiny_encoder, tiny_text_model
from tests.few import few_first
from tests.models.conftest import FAMILIES

SAMPLE = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)))
# SmolVLM's tower takes one square tile
KINDS = [kind for kind in BACKBONES if kind != "smolvlm"]


@pytest.fixture(scope="module", params=few_first(KINDS, FAMILIES))
def model(request):
    return tiny_casa_over(request.param)


@pytest.fixture(params=[{}, {"placement": "before"}, {"placement": "replace", "every": 2}], ids=str)
def kind_of_fusion(request):
    return request.param


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", BACKBONES)
def test_pickled_and_copied_models_are_the_model(kind, kind_of_fusion):
    model = tiny_casa_over(kind, **kind_of_fusion)
    inputs = (SAMPLE.in_squares() if kind == "smolvlm" else SAMPLE).inputs()
    wanted = model(**inputs).logits
    for twin in (pickle.loads(pickle.dumps(model)), pickle.loads(pickle.dumps(copy.deepcopy(model)))):
        assert torch.equal(twin(**inputs).logits, wanted)
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(**inputs).logits, wanted)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("method", ["casa", "insertion"])
def test_its_parts_have_the_names_that_transformers_asks_for(kind, method):
    model = tiny_casa_over(kind, method=method)
    inputs = (SAMPLE.in_squares() if kind == "smolvlm" else SAMPLE).inputs()
    wanted = model(**inputs).logits
    stack, tower = model.get_decoder(), model.get_encoder("image")
    assert stack(input_ids=inputs["input_ids"]).last_hidden_state.shape == (1, 7, 32)
    assert model.get_encoder("video") is tower is model.encoder
    assert model.get_encoder() is model
    assert model.get_encoder("audio") is model
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    assert torch.equal(
        features.last_hidden_state, model.encode_images(inputs["pixel_values"], inputs["image_grid_thw"])
    )
    sizes = [part.shape for part in features.pooler_output]
    assert [width for _, width in sizes] == [32, 32]
    assert all(count > 0 for count, _ in sizes)
    # another of each is put in its place, or refused
    model.set_encoder(copy.deepcopy(tower), "image")
    assert model.get_encoder("image") is not tower
    model.set_decoder(stack)
    if method == "casa":
        with pytest.raises(UserError, match="adapt the other one instead"):
            model.set_decoder(copy.deepcopy(stack))
    else:
        model.set_decoder(copy.deepcopy(stack))
        assert model.get_decoder() is not stack
    with pytest.raises(UserError, match="no encoder for audio"):
        model.set_encoder(tower, "audio")
    assert torch.equal(model(**inputs).logits, wanted)


@torch.no_grad()
def test_an_argument_that_nobody_knows_is_refused(model):
    inputs = SAMPLE.inputs()
    for wrong, words in (
        ({"pixel_value": inputs["pixel_values"]}, "no argument 'pixel_value'; did you mean 'pixel_values'"),
        ({"image_position": None}, "did you mean 'image_positions'"),
        ({"output_attention": True}, "did you mean 'output_attentions'"),
        ({"mm_token_type_ids": None}, "no argument 'mm_token_type_ids'"),
    ):
        with pytest.raises(UserError, match=words):
            model(**inputs, **wrong)
        # transformers says it of what it knows to be of no use to a model
        (name, value), *_ = wrong.items()
        if isinstance(value, torch.Tensor):
            with pytest.raises(ValueError, match=name):
                model.generate(**inputs, **wrong, max_new_tokens=2)
    # what others pass to any model
    wanted = model(**inputs).logits
    ids = inputs["input_ids"]
    passed = {"output_attentions": None, "output_hidden_states": None, "return_dict": None, "token_type_ids": ids * 0}
    assert torch.equal(model(**inputs, **passed, num_items_in_batch=torch.tensor(4), is_causal=True).logits, wanted)


@torch.no_grad()
def test_hidden_states_are_one_more_than_blocks(model):
    output = model(**SAMPLE.inputs(), output_hidden_states=True)
    assert [tuple(hidden.shape) for hidden in output.hidden_states] == [(1, 7, 32)] * 4
    assert torch.equal(model.decoder.logits(output.hidden_states[-1]), output.logits)
    assert model(**SAMPLE.inputs()).hidden_states is None


@torch.no_grad()
def test_attentions_are_those_of_the_text():
    model = tiny_casa()
    wanted = model(**SAMPLE.inputs()).logits
    model.set_attn_implementation("eager")
    output = model(**SAMPLE.inputs(), output_attentions=True)
    assert [tuple(weights.shape) for weights in output.attentions] == [(1, 4, 7, 7)] * 3
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 7).to(weights), rtol=1e-6, atol=1e-6)
        assert not weights.triu(1).any()
    # eager attention takes its softmax in float32
    torch.testing.assert_close(output.logits, wanted, rtol=1e-5, atol=1e-5)
    loaded = CasaForConditionalGeneration._from_config(model.config, attn_implementation="eager")
    assert loaded.decoder.config._attn_implementation == "eager"


@torch.no_grad()
@pytest.mark.parametrize("layers", [[0], [1], [0, 2]])
def test_attentions_stay_with_their_blocks_where_some_are_replaced(layers):
    model = tiny_casa(placement="replace", layers=layers)
    model.set_attn_implementation("eager")
    weights = {}
    for index, block in enumerate(model.decoder.blocks):
        block.self_attn.register_forward_hook(lambda _, args, out, index=index: weights.update({index: out[1]}))
    found = model(**SAMPLE.inputs(), output_attentions=True).attentions
    assert [one is None for one in found] == [index in layers for index in range(3)]
    assert all(one is weights[index] for index, one in enumerate(found))
    said = model.generate(**SAMPLE.inputs(), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    assert [[one is None for one in step] for step in said.attentions] == [[index in layers for index in range(3)]] * 2


@torch.no_grad()
def test_the_first_hidden_states_are_the_embeddings(kind_of_fusion):
    model = tiny_casa(**kind_of_fusion)
    inputs = SAMPLE.inputs()
    for given in (
        inputs,
        {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]), "input_ids": None},
    ):
        found = model(**given, output_hidden_states=True).hidden_states
        assert torch.equal(found[0], model.get_input_embeddings()(inputs["input_ids"]))


@torch.no_grad()
def test_the_config_can_ask_for_outputs():
    model = tiny_casa()
    plain = model(**SAMPLE.inputs())
    model.config.output_hidden_states = True
    assert len(model(**SAMPLE.inputs()).hidden_states) == 4
    assert model(**SAMPLE.inputs(), output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    found = model(**SAMPLE.inputs())
    assert isinstance(found, tuple)
    assert torch.equal(found[0], plain.logits)


@torch.no_grad()
def test_a_tuple_on_request(model):
    inputs = SAMPLE.inputs()
    output = model(**inputs, labels=inputs["input_ids"])
    as_tuple = model(**inputs, labels=inputs["input_ids"], return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.loss)
    assert torch.equal(as_tuple[1], output.logits)
    assert as_tuple[2].num_text == 7
    assert len(model(**inputs, return_dict=False, use_cache=False)) == 1


@torch.no_grad()
def test_embeddings_say_what_ids_say(model):
    batch = as_batch([SAMPLE, TinySample((7, 30, 11), ((1, 1, 2),), seed=20)])
    wanted = model(**batch).logits
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    # Gemma scales inside its embedding, so nothing is left to do behind it
    assert torch.equal(model(**batch, inputs_embeds=embeds).logits, wanted)


@torch.no_grad()
def test_few_logits_are_the_last_of_all(model):
    whole = model(**SAMPLE.inputs()).logits
    torch.testing.assert_close(model(**SAMPLE.inputs(), logits_to_keep=2).logits, whole[:, -2:], rtol=1e-12, atol=1e-12)
    picked = model(**SAMPLE.inputs(), logits_to_keep=torch.tensor([0, 4])).logits
    torch.testing.assert_close(picked, whole[:, [0, 4]], rtol=1e-12, atol=1e-12)


def test_fresh_weights_are_finite_and_not_all_alike(model):
    torch.manual_seed(0)
    fresh = CasaForConditionalGeneration(model.config)
    for name, parameter in fresh.named_parameters():
        assert parameter.isfinite().all(), name
        if parameter.dim() > 1:
            assert parameter.std() > 0, name
    assert fresh.state_dict().keys() == model.state_dict().keys()
    assert (
        fresh.eval()(**SAMPLE.inputs() | {"pixel_values": SAMPLE.inputs()["pixel_values"].float()})
        .logits.isfinite()
        .all()
    )


def test_it_counts_and_names_itself(model):
    assert model.can_generate()
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    embeddings = model.get_input_embeddings().weight.numel()
    assert model.num_parameters(exclude_embeddings=True) <= model.num_parameters() - embeddings
    assert model.main_input_name == "input_ids"
    assert model.base_model is model.backbone
    assert model.get_memory_footprint() == sum(
        t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]
    )


def test_tied_weights_are_one_tensor_wherever_the_model_goes(tmp_path):
    model = adapt(tiny_text_model(tie_word_embeddings=True), vision=tiny_encoder())
    assert "backbone.lm_head.weight" in model.all_tied_weights_keys
    model.save_pretrained(tmp_path)
    for one in (
        model.to(torch.float32),
        CasaForConditionalGeneration.from_pretrained(tmp_path),
        CasaForConditionalGeneration(model.config),
    ):
        assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
        embedding = one.get_input_embeddings().weight
        assert sum(p is embedding for p in one.parameters()) == 1


def test_training_moves_every_part(model):
    model.train()
    try:
        inputs = SAMPLE.inputs()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    finally:
        model.zero_grad()
        model.eval()
    # Qwen3-VL's deep-stack features join behind the first blocks; all else has a gradient
    assert not [name for name in without if "casa_layers" in name or "projector" in name], without


def test_hidden_states_are_part_of_the_graph(model):
    inputs = SAMPLE.inputs()
    output = model(**inputs, output_hidden_states=True, use_cache=False)
    output.hidden_states[1].retain_grad()
    output.logits.sum().backward()
    model.zero_grad()
    assert output.hidden_states[1].grad.any()


@pytest.mark.parametrize("method", ["casa", "insertion"])
def test_generate_hands_out_what_it_is_asked_for(method):
    model = tiny_casa(method=method)
    output = model.generate(
        **SAMPLE.inputs(), max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True,
        output_scores=True, output_logits=True, output_hidden_states=True,
    )  # fmt: skip
    assert output.sequences.shape == (1, 10)
    assert [tuple(scores.shape) for scores in output.scores] == [(1, 61)] * 3
    assert all(torch.equal(*pair) for pair in zip(output.scores, output.logits, strict=True))
    assert [len(hidden) for hidden in output.hidden_states] == [4] * 3
    # the prompt, with its image tokens where they are inserted, then token by token
    assert [hidden[0].shape[1] for hidden in output.hidden_states] == [15 if method == "insertion" else 7, 1, 1]
    assert output.past_key_values.num_text == 9


def test_generated_tokens_are_streamed_one_by_one():
    class Listener(BaseStreamer):
        def __init__(self):
            self.heard, self.ended = [], False

        def put(self, value):
            self.heard.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    listener, model = Listener(), tiny_casa()
    said = model.generate(**SAMPLE.inputs(), max_new_tokens=4, do_sample=False, eos_token_id=None, streamer=listener)
    assert listener.heard == [list(SAMPLE.ids), *([token] for token in said[0, 7:].tolist())]
    assert listener.ended
