"""Ways to decode beyond those of test_generation: assisted, beam sampling, from embeddings; the rest is refused."""

import pytest
import torch

from casa import FusionConfig, adapt
from casa.errors import UserError
from casa.testing import TinySample, as_batch, tiny_backbone, tiny_casa, tiny_casa_over, tiny_encoder, tiny_text_model
from tests.few import few_first

ROWS = (
    TinySample((5, 9, 17, 4, 33), ((2, 2, 3), (4, 1, 2)), seed=11),
    TinySample((7, 30, 11), (), seed=12),
    TinySample((40, 6, 13, 22), ((0, 2, 2), (0, 1, 1)), seed=13),
)
# text repeats itself, so that looking words up in the prompt finds some
ECHO = TinySample((5, 9, 17, 4, 5, 9, 17, 4, 5, 9), ((2, 2, 3), (6, 1, 2)), seed=14)
NEW = 9
FUSIONS = {
    "parallel": {},
    "replace sample": {"placement": "replace", "every": 2, "split": "sample"},
    "history 1": {"history": 1},
    "cross": {"method": "cross_attention"},
}


def generate(model, inputs, **how):
    """New tokens only; no stop token, so that all rows are of one length."""
    how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | how
    return model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]


@pytest.fixture(scope="module", params=few_first(FUSIONS, ("parallel", "cross")))
def model(request):
    return tiny_casa(**FUSIONS[request.param])


@pytest.mark.slow
@pytest.mark.parametrize("sample", [ECHO, ROWS[0], ROWS[1]], ids=["echo", "images", "text"])
def test_assisted_says_what_greedy_says(model, sample, monkeypatch):
    wanted = generate(model, sample.inputs())
    taken_back = []
    for how in (
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": tiny_text_model().eval()},
        {"assistant_model": tiny_casa(seed=5)},
        {"assistant_model": tiny_casa()},
    ):
        cache = model.new_cache()
        crop = cache.crop
        monkeypatch.setattr(cache, "crop", lambda count, crop=crop: (taken_back.append(int(count)), crop(count)))
        found = generate(model, sample.inputs(), past_key_values=cache, **how)
        assert torch.equal(found, wanted), how
    assert min(taken_back) < 0, "some drafts were wrong"


def test_an_assistant_drafts_from_the_text_alone():
    model, assistant, seen = tiny_casa(), tiny_casa(seed=5), []
    hook = assistant.register_forward_pre_hook(lambda _, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    generate(model, ROWS[0].inputs(), assistant_model=assistant)
    hook.remove()
    assert seen
    assert not any(names & {"pixel_values", "image_positions"} for names in seen)


def test_assisted_sampling_is_in_range_and_repeats():
    model, found = tiny_casa(), []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(generate(model, ROWS[0].inputs(), do_sample=True, top_k=5, prompt_lookup_num_tokens=2))
    assert torch.equal(*found)
    # a batch of one candidate is greedy
    top = generate(model, ROWS[0].inputs(), do_sample=True, top_k=1, prompt_lookup_num_tokens=2)
    assert torch.equal(top, generate(model, ROWS[0].inputs()))


@pytest.mark.parametrize("kind", few_first(["qwen2_5_vl", "gemma3_text", "mistral"], ["qwen2_5_vl"]))
def test_other_families_are_assisted_too(kind):
    model = tiny_casa_over(kind)
    wanted = generate(model, ECHO.inputs())
    assert torch.equal(generate(model, ECHO.inputs(), prompt_lookup_num_tokens=3), wanted)
    if kind != "qwen2_5_vl":
        assert torch.equal(generate(model, ECHO.inputs(), assistant_model=tiny_backbone(kind, seed=4)), wanted)


def test_beam_sampling_is_the_same_cached_or_not(model):
    found = []
    for cached in (True, False):
        torch.manual_seed(5)
        found.append(generate(model, as_batch(ROWS), num_beams=3, do_sample=True, top_k=8, use_cache=cached))
    assert torch.equal(*found)


def test_best_beams_come_first_and_differ():
    model = tiny_casa()
    output = model.generate(
        **ROWS[2].inputs(), max_new_tokens=4, do_sample=False, eos_token_id=None, num_beams=4, num_return_sequences=3,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert len({tuple(row) for row in output.sequences.tolist()}) == 3
    assert output.sequences_scores.tolist() == sorted(output.sequences_scores.tolist(), reverse=True)
    best = generate(model, ROWS[2].inputs(), num_beams=4, max_new_tokens=4)
    assert output.sequences[0, 4:].tolist() == best[0].tolist()


def test_text_given_as_embeddings(model):
    inputs = ROWS[0].inputs()
    wanted = generate(model, inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    found = model.generate(**inputs, inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert torch.equal(found, wanted)


CACHES = ["static", "offloaded_static", "offloaded", "quantized"]


@pytest.mark.parametrize("method", ["casa", "insertion"])
@pytest.mark.parametrize("kind", CACHES)
def test_other_caches_are_refused_by_name(kind, method):
    model = tiny_casa(method=method)
    with pytest.raises(UserError, match=f"cache_implementation '{kind}' is not supported; leave it out"):
        generate(model, ROWS[0].inputs(), cache_implementation=kind)
    assert torch.equal(
        generate(model, ROWS[0].inputs(), cache_implementation="dynamic"), generate(model, ROWS[0].inputs())
    )


def test_what_cannot_be_decoded_is_refused_before_anything_is_computed():
    model, ran = tiny_casa(), []
    inserted = tiny_casa(method="insertion")
    hooks = [m.register_forward_pre_hook(lambda *_: ran.append(1)) for m in (model, inserted)]
    for one, how, words in (
        (inserted, {"prompt_lookup_num_tokens": 3}, "assisted decoding takes tokens back"),
        (inserted, {"assistant_model": tiny_text_model()}, "assisted decoding takes tokens back"),
        (model, {"assistant_early_exit": 2}, "assistant_early_exit is not supported"),
        (model, {"penalty_alpha": 0.6, "top_k": 4}, "contrastive search is code on a hub"),
        (model, {"dola_layers": "low"}, "is code on a hub"),
        (model, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "is code on a hub"),
    ):
        with pytest.raises(UserError, match=words):
            generate(one, ROWS[0].inputs(), **how)
    for hook in hooks:
        hook.remove()
    assert not ran


def test_an_assistant_serves_one_row():
    with pytest.raises(ValueError, match="batch_size = 1"):
        generate(tiny_casa(), as_batch(ROWS), prompt_lookup_num_tokens=3)


@pytest.fixture(scope="module")
def with_gist():
    return adapt(tiny_text_model(), FusionConfig(gist=2), vision=tiny_encoder()).eval()


GIST = TinySample((61, 62, 9, 17, 61, 62, 5, 9), ((0, 1, 1), (4, 2, 2)), seed=15)


@pytest.mark.filterwarnings("ignore:Passing `no_repeat_ngram_size` with `inputs_embeds`")
def test_text_given_as_embeddings_has_no_gist_tokens_to_hide(with_gist):
    embeds = with_gist.get_input_embeddings()(torch.tensor([[5, 9, 17]]))
    found = with_gist.generate(inputs_embeds=embeds, no_repeat_ngram_size=2, max_new_tokens=2, do_sample=False)
    assert found.shape == (1, 2)


def test_gist_tokens_are_not_drafted_from(with_gist):
    with pytest.raises(UserError, match="gist tokens have ids that who drafts does not know"):
        generate(with_gist, GIST.inputs(), prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("how", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}], ids=str)
def test_penalties_do_not_stumble_over_gist_tokens(with_gist, how):
    """The same scores as of the text alone."""
    seen = []

    def record(ids, scores):
        seen.append((ids.clone(), scores.clone()))
        return scores

    found = generate(with_gist, GIST.inputs(), logits_processor=[record], **how)
    assert found.shape == (1, NEW)
    assert found.max() < 61
    ids, _ = seen[0]
    assert ids[0].tolist() == [9, 9, 9, 17, 17, 17, 5, 9]
    plain = generate(with_gist, GIST.inputs(), max_new_tokens=1)
    assert (
        how != {"no_repeat_ngram_size": 2} or (9, int(plain)) not in {(9, 17), (9, 9)} or int(found[0, 0]) != int(plain)
    )
