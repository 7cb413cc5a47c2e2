"""The real scale of a study over stand-ins: what is frozen stays, what is asked is in the text model's own words."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from casa.errors import UserError
from casa.settings import build
from casa.testing import tiny_tokenizer
from casa.vision.page_encoder import PageEncoder, PageEncoderConfig, image_processor
from casa.vision.page_words import BEFORE, IDS, NOTHING, TAG_IDS
from projects.casa_smol.parts import TEMPLATE
from projects.casa_smol.tasks import asked
from projects.study.grid import Study
from projects.study.printed import PRINTED, printed
from projects.study.real import MARKS, align, begin_real
from projects.study.run import train_run
from projects.study.tasks import TASKS, Writer

COUNTS = {"train": {"line": 6}, "held_out": {"line": 3}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "text")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "text")
        made: Any = {"hidden_size": 8, "stem_sizes": (4, 4), "dilations": (1,), "token_size": (16, 16)}
        PageEncoder(PageEncoderConfig(**made, token_parts=("features", "places"))).save_pretrained(folder / "eyes")
    return folder


@pytest.fixture(scope="module")
def study(parts):
    return build(
        Study,
        {
            "name": "real",
            "shared": {"parts": str(parts), "pictures": COUNTS, "seed": 3},
            "budget": {"steps": 20, "samples": 2, "warmup": 1, "most_turns": 2, "muon_lr": 0, "dropout": 0.0},
            "tasks": {"read": {"weights": {"line": 1}, "questions": {"line": 3}}},
            "groups": [
                {
                    "name": "main",
                    "tasks": "read",
                    "seeds": [1],
                    "inspect": ["casa"],
                    "runs": {"casa": {}, "insertion": {"method": "insertion", "lora": 2}},
                }
            ],
        },
        what="the study",
    )


@pytest.fixture(scope="module")
def beginning(study, tmp_path_factory):
    return begin_real(study, tmp_path_factory.mktemp("study"))


def test_a_picture_is_kept_as_the_encoder_sees_it_alone(beginning, parts):
    encoder: Any = PageEncoder.from_pretrained(parts / "eyes", dtype=torch.float32).eval()
    for split, counts in COUNTS.items():
        bank = beginning.banks[split]["line"]
        for number, one in enumerate(asked("line", split, 3, counts["line"])):
            seen = image_processor(encoder.config)([one.picture], return_tensors="pt")
            assert bank.grids[number] == tuple(seen["image_grid_thw"][0, 1:].tolist())
            rows, columns = bank.grids[number]
            blocks = seen["pixel_values"].view(rows, columns, 3, 16, 16).permute(2, 0, 3, 1, 4)
            with torch.no_grad():
                wanted = encoder.tokens(blocks.reshape(1, 3, rows * 16, columns * 16))[0]
            torch.testing.assert_close(bank.features[number].float(), wanted, atol=2e-3, rtol=2e-3)
            assert bank.facts[number]["turns"] == [[turn.question, turn.answer, "all"] for turn in one.turns]


def test_a_sample_is_a_chat_of_the_text_models_own(beginning, parts):
    tokenizer: Any = AutoTokenizer.from_pretrained(parts / "text")
    bank, writer = beginning.banks["train"], Writer(tokenizer, marks=MARKS)
    sample = TASKS["line"](bank, np.random.default_rng(2), 2)
    chat = writer.write(sample)
    learned = tokenizer.decode([token for token, learn in zip(chat.ids, chat.learn, strict=True) if learn])
    assert learned == "".join(part.replace("<end>", "<|im_end|>\n") for part in sample.parts[1::2])
    messages = []
    for number, part in enumerate(sample.parts):
        words = part.replace("<image>", "").replace("<frame>", "")
        for mark in ("<user>", "<end>", "<assistant>"):
            words = words.replace(mark, "")
        messages.append({"role": "assistant" if number % 2 else "user", "content": words})
    assert tokenizer.decode(chat.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    before = tokenizer.decode(chat.ids[: chat.places[0]])
    assert before == "<|im_start|>user\n", "the picture stands in front of the question"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["casa", "insertion"])
def test_a_run_trains_what_is_new_and_the_text_model_stays(study, beginning, parts, tmp_path, name, monkeypatch):
    (run,) = [one for one in study.runs() if one.name == name]
    kept: list[Any] = []
    made = type(beginning).model

    def model(self, *given):
        kept.append(made(self, *given))
        return kept[0]

    monkeypatch.setattr(type(beginning), "model", model)
    record = train_run(study, run, beginning, tmp_path)
    trained = [name for name, parameter in kept[0].named_parameters() if parameter.requires_grad]
    assert trained
    # a rate of 1e-3 is too fine a step for bfloat16
    assert {parameter.dtype for parameter in kept[0].parameters() if parameter.requires_grad} == {torch.float32}
    new = ("lora_", "projector") if name == "insertion" else ("casa_layers", "projector")
    assert all(any(part in one for part in new) for one in trained)
    assert all(any(part in one for one in trained) for part in new)
    before = LlamaForCausalLM.from_pretrained(parts / "text", dtype=torch.bfloat16).state_dict()
    after = {one.replace("base_layer.", ""): value for one, value in kept[0].state_dict().items()}
    for key, value in before.items():
        (same,) = [other for one, other in after.items() if one.endswith(f"backbone.{key}")]
        assert torch.equal(same, value), key
    assert record["run"].get("lora", 0) == run.lora == (2 if name == "insertion" else 0)
    assert len(record["scores"]["line.all"]["exact"]) == 3
    assert len(record["curve"]) == 2
    written = json.loads((tmp_path / "records" / f"{run.id}.json").read_text())
    assert written["text_model"] != written["eyes"]
    assert ("attention" in written) == (name == "casa")


def test_all_methods_begin_with_words_near_their_embeddings():
    sizes = (8, 4, 4, 4, 4, 6, 12, 8, 4)
    made: Any = {"hidden_size": 8, "stem_sizes": (4, 4), "dilations": (1,), "token_size": (16, 16), "reads": True}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder = PageEncoder(PageEncoderConfig(**made, token_parts=("places",), word_sizes=sizes))
        codes = torch.nn.functional.normalize(torch.randn(300, 12), dim=-1)
        embeddings = codes @ torch.randn(12, 24) + torch.randn(24)
        projector = torch.nn.Linear(sum(sizes) + 28, 24)
    encoder.learn_words(codes, tiny_tokenizer("gpt2").backend_tokenizer.to_str())
    align(projector, encoder, embeddings)
    ids = torch.full((IDS,), NOTHING)
    ids[TAG_IDS + BEFORE] = 41  # begins here; another one stands before it
    ids[TAG_IDS + BEFORE - 1] = 17
    code = torch.nn.functional.pad(encoder.codes_of(ids, torch.float32), (0, 28))
    centred = embeddings - embeddings.mean(0)
    assert int(torch.cdist(projector(code)[None], centred).argmin()) == 41
    nothing = torch.zeros_like(code)
    nothing[-28:] = 1
    assert not projector(nothing).any()


@pytest.mark.parametrize("task", PRINTED)
def test_small_pictures_of_print_are_drawn_by_seed(task):
    drawn = list(printed(task, "train", 5, 12))
    for one, again in zip(drawn, printed(task, "train", 5, 12), strict=True):
        assert one.picture.tobytes() == again.picture.tobytes()
        assert one.turns == again.turns
        # of few image tokens, and every question has an answer of its own
        assert 8 <= one.picture.width * one.picture.height / 256 < 250
        assert one.turns
        assert len({turn.question for turn in one.turns}) == len(one.turns)
    assert all(
        one.picture.tobytes() != other.picture.tobytes()
        for one, other in zip(drawn, printed(task, "held_out", 5, 12), strict=True)
    )


def test_a_list_of_prices_answers_both_ways_alike():
    asked = 0
    for one in printed("prices", "held_out", 6, 30):
        priced = {
            turn.answer: turn for turn in one.turns if turn.question.startswith(("How", "What does", "What is the"))
        }
        for turn in one.turns:
            if turn.answer not in priced and (price := next((p for p in priced if p in turn.question), None)):
                assert turn.answer in priced[price].question
                asked += 1
    assert asked > 5


def test_without_its_parts_it_says_how_to_make_them(study, tmp_path):
    lacking = build(
        Study,
        {
            "name": "real",
            "shared": {"parts": str(tmp_path / "none"), "pictures": COUNTS},
            "budget": {"steps": 1},
            "tasks": {"read": {"weights": {"line": 1}, "questions": {"line": 1}}},
            "groups": [{"name": "main", "tasks": "read", "runs": {"casa": {}}}],
        },
        what="the study",
    )
    with pytest.raises(UserError, match=r"python -m projects\.casa_smol\.parts"):
        begin_real(lacking, tmp_path)
