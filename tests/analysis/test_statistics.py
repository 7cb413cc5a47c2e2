"""Statistics over a set against the same figures worked out one by one."""

import csv
import json
import math

import pytest
import torch
from PIL import Image

from casa.analysis import ablated, attention_shares
from casa.analysis.inspection import question_inputs, with_answer
from casa.analysis.set_plots import tables, write_statistics
from casa.analysis.statistics import Case, set_statistics
from casa.errors import UserError
from casa.testing import noise_frames, tiny_casa, tiny_processor

ANSWERS = [(8, 9, 2), (12, 2), (30, 31, 32, 2)]


def cases(**more):
    processor = tiny_processor()
    # of several image tokens each
    frames = [Image.fromarray(frame) for frame in noise_frames(0, 6) if len(frame) > 28][:3]
    return [
        Case(question_inputs(processor, [frame], f"is it {number}"), answer, **more)
        for number, (frame, answer) in enumerate(zip(frames, ANSWERS, strict=True))
    ]


def said(model, case):
    """(greedy decoding says it, log-likelihood per token), the slow way."""
    start = case.inputs["input_ids"].shape[1]
    said = model.generate(**case.inputs, max_new_tokens=len(case.answer), do_sample=False, eos_token_id=None)
    logits = model(**with_answer(dict(case.inputs), case.answer), use_cache=False).logits[0].log_softmax(-1)
    chances = [float(logits[start - 1 + n, token]) for n, token in enumerate(case.answer)]
    return said[0, start:].tolist() == list(case.answer), sum(chances) / len(chances)


@torch.no_grad()
@pytest.mark.parametrize(
    "fusion",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"every": 2, "placement": "before"},
        pytest.param({"method": "cross_attention"}, marks=pytest.mark.slow),
        {"method": "insertion"},
    ],
    ids=str,
)
def test_every_figure_is_the_one_by_hand(fusion):
    model, given = tiny_casa(**fusion), cases()
    # one answer is what the model says
    start = given[1].inputs["input_ids"].shape[1]
    own = model.generate(**given[1].inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)[0, start:].tolist()
    given[1] = Case(given[1].inputs, own)
    found = set_statistics(model, given)
    assert (found.questions, found.tokens) == (3, 3 + 3 + 4)
    for name, score in found.scores.items():
        with ablated(model, *([name] if name and name != "only-layers=" else [])):
            if name == "only-layers=":
                continue
            wanted = [said(model, case) for case in given]
        assert score.exact == pytest.approx(sum(right for right, _ in wanted) / 3)
        assert score.log_likelihood == pytest.approx(sum(chance for _, chance in wanted) / 3, abs=1e-5)
    assert found.scores[""].exact >= 1 / 3
    per_layer = 0 if fusion.get("method") == "insertion" else 2 * len(model.fused_blocks)
    both = 2 if fusion.get("method") is None else 0
    assert len(found.scores) == 2 + both + per_layer
    if per_layer:
        # with no layer at work the picture does nothing
        blind = sum(
            said(model, Case({k: v for k, v in c.inputs.items() if "image" not in k and "pixel" not in k}, c.answer))[1]
            for c in given
        )
        if fusion.get("placement") != "replace":
            assert found.scores["only-layers="].log_likelihood == pytest.approx(blind / 3, abs=1e-5)
    shares, ratios, spread = [], [], []
    for case in given:
        start = case.inputs["input_ids"].shape[1]
        rows = range(start - 1, start - 1 + len(case.answer))
        one = attention_shares(model, with_answer(dict(case.inputs), case.answer), rows)
        shares.append(one.shares)
        own, _, image = one.heads
        ratios.append((own.clamp(min=1e-30) / (image / one.num_image)).log10())
        count = float(one.num_image[0])
        spread.append((one.image_entropy() / math.log(count)).mean((1, 2)))
    torch.testing.assert_close(found.shares, torch.cat(shares, -1).mean(-1))
    torch.testing.assert_close(found.gate(), torch.cat(ratios, -1).median(-1).values)
    torch.testing.assert_close(found.entropy, torch.stack(spread, 1))
    assert 0 < float(found.entropy.min()) <= float(found.entropy.max()) <= 1


def test_need_is_told_or_found_out():
    model = tiny_casa()
    found = set_statistics(model, cases(), layers=False)
    assert found.needs_picture.tolist() == [gain >= math.log(2) for gain in found.gain.tolist()]
    lengths = [len(answer) for answer in ANSWERS]
    told = set_statistics(model, cases(needs_picture=True), layers=False)
    assert told.needs_picture.tolist() == [True] * 3
    assert told.entropy_by_need()["not needed"] == []
    whole, blind = told.scores[""], told.scores["no-images"]
    mean = sum(gain / n for gain, n in zip(told.gain.tolist(), lengths, strict=True)) / 3
    assert mean == pytest.approx(whole.log_likelihood - blind.log_likelihood, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["casa", "insertion"])
def test_files_hold_the_figures(tmp_path, method):
    found = set_statistics(tiny_casa(method=method), cases())
    files = write_statistics(tmp_path, found, {"inspect": "tiny"})
    names = {"statistics.json", "gate.csv", "layers.csv", "entropy.csv", "gate.png", "entropy.png"}
    assert {file.name for file in files} == names | ({"layers.png"} if method == "casa" else set())
    assert all(file.stat().st_size for file in files)
    told = json.loads((tmp_path / "statistics.json").read_text())
    assert (told["inspect"], told["questions"]) == ("tiny", 3)
    assert told["gate_log10"] == found.gate().tolist()
    with (tmp_path / "gate.csv").open() as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + found.gate().numel()
    assert [float(x) for x in rows[1][3:]] == pytest.approx(found.shares[:, 0, 0].tolist())
    assert sum(float(x) for x in rows[-1][3:]) == pytest.approx(1)
    assert tables(found)["layers"][1] == ["whole", found.scores[""].exact, found.scores[""].log_likelihood]


def test_what_has_no_number_is_none_in_a_file():
    # of a single image token the entropy is not defined; plain cross-attention sees no text
    small = [Image.fromarray(frame) for frame in noise_frames(0, 6) if len(frame) == 28][:1]
    case = Case(question_inputs(tiny_processor(), small, "is it"), ANSWERS[0], True)
    told = set_statistics(tiny_casa(method="cross_attention"), [case], layers=False).to_dict()
    assert told["entropy"]["needed"] == [[None] * 3] * 3
    assert told["attention_quantiles"]["one other text token"] == [[None] * 5] * 3
    json.loads(json.dumps(told, allow_nan=False))


def test_a_set_without_pictures_is_refused():
    with pytest.raises(UserError, match="no question to measure"):
        set_statistics(tiny_casa(), [])
    inputs = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2)}
    with pytest.raises(UserError, match="row 3 has no picture"):
        set_statistics(tiny_casa(), [Case(inputs, (2,), name="row 3")])
