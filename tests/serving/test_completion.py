"""A completion in slices says what it says in one go, and waits for one picture at most."""

import pytest
import torch

from casa.models.image_processing_casa import CasaSquareImageProcessor
from casa.models.inputs import count_tokens
from casa.serving import Limits
from casa.serving.chat import ChatRequest, RequestError, read_chat
from casa.serving.completion import Completion, Detokenizer
from casa.streaming import Sampling
from casa.testing import tiny_casa, tiny_casa_over, tiny_processor
from casa.vision import token_grids


@pytest.fixture
def asked(data_urls):
    def make(**changes):
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in data_urls[:3]]
        content = [*parts, {"type": "text", "text": "say"}]
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 6}
        return read_chat(body | changes, "tiny", Limits(), False)

    return make


def begun(model, request, most=8192):
    pieces = []
    processor = tiny_processor()
    return Completion(model, processor, Detokenizer(processor.tokenizer), request, most, pieces.append), pieces


def test_slices_join_to_the_whole(model, asked, monkeypatch):
    whole, at_once = begun(model, asked())
    assert whole.advance(float("inf"))
    encoded = []
    encode = type(model).encode_images

    def noted(self, pixels, grid):
        encoded.append(len(grid))
        return encode(self, pixels, grid)

    monkeypatch.setattr(type(model), "encode_images", noted)
    sliced, in_turns = begun(model, asked())
    turns, seen = 0, []
    while not sliced.advance(0):
        turns += 1
        seen.append(sum(encoded))
    # the prompt, three pictures, and then a token at a time
    assert encoded == [1, 1, 1]
    assert seen[:4] == [0, 1, 2, 3]
    assert "".join(p.text for p in in_turns) == "".join(p.text for p in at_once)
    assert (sliced.prompt_tokens, sliced.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert turns >= 4


def test_what_nobody_wants_any_more_ends(model, asked):
    work, pieces = begun(model, asked())
    work.advance(0)
    work.cancelled = True
    assert work.advance(float("inf"))
    assert pieces == []


def test_pictures_count_towards_the_prompt(model, asked):
    work, _ = begun(model, asked(), most=10)
    with pytest.raises(RequestError, match="at most 10"):
        work.advance(float("inf"))


def test_a_temperature_next_to_nothing_is_greedy(model, asked):
    greedy, plain = begun(model, asked(temperature=0))
    cold, icy = begun(model, asked(temperature=1e-320))
    with torch.no_grad():
        assert greedy.advance(float("inf"))
        assert cold.advance(float("inf"))
    assert [piece.text for piece in plain] == [piece.text for piece in icy]


def told(pieces, index):
    return "".join(piece.text for piece in pieces if piece.index == index)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", [{}, {"placement": "before", "history": 1}, {"method": "insertion"}])
def test_several_answers_are_those_of_single_requests(asked, fusion):
    """Whatever the batch they are said in: the first has the request's seed, the others seeds drawn from it."""
    model = tiny_casa(dtype=torch.float32, **fusion)
    model.backbone.lm_head.weight.data[2] = model.backbone.lm_head.weight.data[3:].mean(0) * 3
    model.generation_config.eos_token_id = 2
    many, pieces = begun(model, asked(temperature=1.5, seed=5, n=4, max_tokens=12))
    while not many.advance(0):
        pass
    texts = [told(pieces, index) for index in range(4)]
    assert len(set(texts)) > 1
    finishes = {piece.index: piece.finish for piece in pieces if piece.finish is not None}
    assert sorted(finishes) == [0, 1, 2, 3]
    seeds = [choice._generator.initial_seed() for choice in many.choices]
    assert seeds[0] == 5
    spent = 0
    for text, seed in zip(texts, seeds, strict=True):
        one, alone = begun(model, asked(temperature=1.5, seed=seed, max_tokens=12))
        assert one.advance(float("inf"))
        assert told(alone, 0) == text
        spent += one.completion_tokens
    assert many.completion_tokens == spent
    assert many.prompt_tokens == one.prompt_tokens


@pytest.mark.parametrize("kind", ["smolvlm", "qwen2_5_vl", "qwen3_vl", "gemma3_text"])
@pytest.mark.parametrize("fusion", [{}, {"method": "insertion"}])
def test_towers_of_any_kind(kind, fusion, pictures):
    """Those that take squares, too, and connectors that make fewer tokens of a picture: the same as `generate` says."""
    model, processor = tiny_casa_over(kind, **fusion), tiny_processor()
    if kind == "smolvlm":
        processor.image_processor = CasaSquareImageProcessor(size={"height": 56, "width": 56}, patch_size=14)
    model.generation_config.eos_token_id = 2
    parts = [{"type": "image", "image": picture} for picture in pictures[:2]] + [{"type": "text", "text": "say"}]
    chat = [{"role": "user", "content": parts}]
    pieces = []
    request = ChatRequest(chat, 6, Sampling(), 0, (), False, False)
    work = Completion(model, processor, Detokenizer(processor.tokenizer), request, 8192, pieces.append)
    assert work.advance(float("inf"))
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    with torch.no_grad():
        said = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert told(pieces, 0) == processor.tokenizer.decode(said, skip_special_tokens=True).lstrip()
    grids = model.final_grids(token_grids(model.config.encoder_config, inputs["image_grid_thw"]))
    assert work.prompt_tokens == inputs["input_ids"].shape[1] + count_tokens(grids)


def test_logprobs_are_the_models_own(model, asked):
    """Whatever is sampled from: of the logits as the model gave them."""
    settings = {"temperature": 0.7, "top_k": 5, "presence_penalty": 1, "seed": 3, "max_tokens": 9}
    plain, quiet = begun(model, asked(**settings))
    assert plain.advance(float("inf"))
    assert quiet[-1].logprobs is None
    work, pieces = begun(model, asked(**settings, logprobs=True, top_logprobs=4))
    assert work.advance(float("inf"))
    assert told(pieces, 0) == told(quiet, 0)
    entries = [entry for piece in pieces for entry in piece.logprobs]
    ids = work.choices[0].tokens
    assert len(entries) == len(ids) == work.completion_tokens
    processor = tiny_processor()
    reader = begun(model, asked())[0]
    prompt, pictures = reader.prompt()
    images = torch.cat([model.encode_images(p["pixel_values"], p["image_grid_thw"]) for p in pictures])
    tokens = torch.cat([prompt["input_ids"], torch.tensor([ids])], dim=1)
    with torch.no_grad():
        logits = model(**(prompt | {"input_ids": tokens}), image_features=images).logits[0].float().log_softmax(-1)
    start = prompt["input_ids"].shape[1] - 1
    for place, (entry, token) in enumerate(zip(entries, ids, strict=True)):
        scores = logits[start + place]
        assert entry["logprob"] == pytest.approx(float(scores[token]), abs=1e-4)
        assert bytes(entry["bytes"]).decode() == entry["token"]
        best = entry["top_logprobs"]
        assert [one["logprob"] for one in best] == pytest.approx(scores.topk(4).values.tolist(), abs=1e-4)
        assert best[0]["token"] == processor.tokenizer.convert_ids_to_tokens(int(scores.argmax()))
    assert "".join(entry["token"] for entry in entries).strip() == told(pieces, 0).strip()


def test_logprobs_of_what_a_stop_string_cuts_off_are_not_told(model, asked):
    whole, pieces = begun(model, asked(max_tokens=12, logprobs=True))
    assert whole.advance(float("inf"))
    text = told(pieces, 0)
    stop = text[4:7]
    cut, shorter = begun(model, asked(max_tokens=12, logprobs=True, stop=stop))
    assert cut.advance(float("inf"))
    assert told(shorter, 0) == text[: text.index(stop)]
    entries = [entry["token"] for piece in shorter for entry in piece.logprobs]
    assert "".join(entries) == told(shorter, 0)  # a letter is a token here


def test_a_chat_that_the_template_refuses_is_the_clients_error(model, asked):
    processor = tiny_processor()
    processor.chat_template = "{% if messages|length > 1 %}{{ raise_exception('Roles must alternate!') }}{% endif %}"
    request = asked(messages=[{"role": "user", "content": "a"}] * 2)
    with pytest.raises(RequestError, match="chat template refuses this chat: Roles must alternate!") as caught:
        Completion(model, processor, Detokenizer(processor.tokenizer), request, 8192, print).advance(float("inf"))
    assert (caught.value.status, caught.value.param) == (400, "messages")
