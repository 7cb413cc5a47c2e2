"""The adapter for lmms-eval over a stub of its base class and requests; lmms_trial.py tries it under the real one."""

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import casa as package
from casa.analysis.inspection import question_inputs, with_answer
from casa.errors import UserError
from casa.media import VideoWriter
from casa.testing import noise_frames, tiny_checkpoint
from tests.few import few_first


class BaseModel:
    """What the adapter uses of lmms_eval.api.model.lmms."""

    def __init__(self):
        self.cache_hook = SimpleNamespace(add_partial=lambda *given: self.cached.append(given))
        self.task_dict, self.cached = {}, []

    @staticmethod
    def _resolve_system_prompt(value):
        return value

    def _apply_system_prompt(self, messages, prompt):
        return [{"role": "system", "content": [{"type": "text", "text": prompt}]}, *messages] if prompt else messages


@dataclass
class Wrapped:
    """What passes through lmms-eval 0.7 as it is."""

    text: object


@pytest.fixture
def lmms(monkeypatch):
    """The adapter's module, with lmms-eval's parts in their places."""
    below = ("api", "api.model", "api.instance", "models", "models.registry_v2")
    modules = {name: ModuleType(name) for name in ("lmms_eval", *(f"lmms_eval.{name}" for name in below))}
    modules["lmms_eval.api.instance"].GenerationResult = Wrapped
    modules["lmms_eval.api.model"].lmms = BaseModel
    modules["lmms_eval.models.registry_v2"].ModelManifest = SimpleNamespace
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    # whoever imported it before had none of them
    sys.modules.pop("casa.evaluation.lmms", None)
    yield importlib.import_module("casa.evaluation.lmms")
    sys.modules.pop("casa.evaluation.lmms", None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def frames():
    return [Image.fromarray(frame) for frame in noise_frames(0, 4)]


def requests(model, rows, second):
    """One request for each (text, what is shown)."""
    model.task_dict = {"task": {"test": [{"shown": shown} for _, shown in rows]}}
    return [
        SimpleNamespace(args=(text, more, lambda doc: doc["shown"], number, "task", "test"))
        for number, ((text, _), more) in enumerate(zip(rows, second, strict=True))
    ]


def test_lmms_eval_is_told_where_the_model_is(lmms):
    told = lmms.manifest()
    module, _, name = told.simple_class_path.rpartition(".")
    assert told.model_id == "casa"
    assert issubclass(getattr(sys.modules[module], name), BaseModel)
    entries = [e for e in importlib.metadata.entry_points(group="lmms_eval.models") if e.name == "casa"]
    # an environment that was made before the entry was has none
    assert all(entry.value == "casa.evaluation.lmms:manifest" for entry in entries)


@pytest.mark.parametrize("size", few_first([1, 3], [3]))
def test_answers_are_those_of_the_model_asked_by_itself(lmms, checkpoint, frames, size):
    model = lmms.Casa(str(checkpoint), device="cpu", batch_size=size)
    rows = [
        ("what", [frames[0]]),
        ("which of these", [frames[1], frames[2]]),
        ("no picture", None),
        ("is it", frames[3]),
    ]
    settings = [
        {"max_new_tokens": 6},
        {"max_new_tokens": 6},
        {"max_new_tokens": 3, "until": ["\n\n"]},
        {"max_new_tokens": 6},
    ]
    found = model.generate_until(requests(model, rows, settings))
    eyes = package.load(checkpoint, device="cpu")
    wanted = [
        eyes.ask([shown] if isinstance(shown, Image.Image) else shown, text, max_new_tokens=how["max_new_tokens"])
        for (text, shown), how in zip(rows, settings, strict=True)
    ]
    assert found == wanted
    assert sorted(answer for _, _, answer in model.cached) == sorted(wanted)


@torch.no_grad()
@pytest.mark.parametrize("size", few_first([1, 4], [4]))
def test_likelihoods_are_those_of_single_passes(lmms, checkpoint, frames, size):
    model = lmms.Casa(str(checkpoint), device="cpu", batch_size=size)
    rows = [("what", [frames[0]]), ("which of these two", [frames[1], frames[2]]), ("a", [frames[3]])]
    words = ["yes", "i am not so sure", lambda doc: "no"]
    found = [one.text for one in model.loglikelihood(requests(model, rows, words))]
    said = ["yes", "i am not so sure", "no"]
    for (text, shown), word, (loss, greedy) in zip(rows, said, found, strict=True):
        given = question_inputs(model.processor, shown, text)
        ids = model.tokenizer(word, add_special_tokens=False)["input_ids"]
        logits = model.model(**with_answer(given, ids), use_cache=False).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
        wanted = -sum(float(logits[n, token]) for n, token in enumerate(ids)) / len(ids)
        assert loss == pytest.approx(wanted, abs=1e-5)
        assert greedy == (logits.argmax(-1).tolist() == ids)
    # what greedy decoding says is told as such
    [own] = model.generate_until(requests(model, rows[:1], [{"max_new_tokens": 2}]))
    assert model.loglikelihood(requests(model, rows[:1], [own]))[0].text[1] or " " in own or len(own) != 2
    # a continuation by itself
    assert len(model.loglikelihood([SimpleNamespace(args=("", "yes"))])) == 1


def test_pictures_stand_where_the_text_has_them(lmms, checkpoint, frames):
    model = lmms.Casa(str(checkpoint), device="cpu", system_prompt="be brief")
    for text, wanted in (
        ("<image 2> or <image 1>?", [1, " or ", 0, "?"]),
        ("a <image> b <image>", ["a ", 0, " b ", 1]),
        ("<image>\nboth?", [0, 1, "both?"]),
        ("<image 1> of three?", [0, 1, "<image 1> of three?"]),
    ):
        [request] = requests(model, [(text, frames[:2])], [{}])
        system, user = model._chat(request)
        assert system["content"][0]["text"] == "be brief"
        found = [part["text"] if part["type"] == "text" else frames.index(part["image"]) for part in user["content"]]
        assert found == wanted


def test_whatever_a_task_shows_becomes_pictures(lmms, checkpoint, frames, tmp_path):
    model = lmms.Casa(str(checkpoint), device="cpu", max_num_frames=3, fps=2)
    frames[0].save(tmp_path / "a.png")
    with VideoWriter(tmp_path / "clip.mp4", (84, 56), fps=10) as film:
        for level in range(40):
            film.write(np.full((56, 84, 3), 6 * level, dtype=np.uint8))
    shown = [
        frames[0],
        np.asarray(frames[1]),
        str(tmp_path / "a.png"),
        {"path": str(tmp_path / "a.png"), "bytes": None},
        {"bytes": (tmp_path / "a.png").read_bytes()},
        [str(tmp_path / "clip.mp4")],
    ]
    found = list(model._pictures(shown))
    assert [one.size for one in found] == [frames[n].size for n in (0, 1, 0, 0, 0)] + [(84, 56)] * 3
    levels = [float(np.asarray(one).mean()) for one in found[5:]]
    assert levels[0] < levels[1] < levels[2]
    with pytest.raises(UserError, match="casa cannot see"):
        list(model._pictures(3))


def test_settings_are_greedy_unless_a_task_asks(lmms, caplog):
    assert lmms.settings_of({}) == {"max_new_tokens": 256, "do_sample": False}
    assert lmms.settings_of({"temperature": 0, "top_p": None, "do_sample": False, "max_gen_toks": 9}) == {
        "max_new_tokens": 9,
        "do_sample": False,
    }
    drawn = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 4}
    assert lmms.settings_of(drawn) == drawn | {"do_sample": True}
    assert not caplog.records
    lmms.settings_of({"image_aspect_ratio": "pad"})
    assert "image_aspect_ratio" in caplog.text


def test_an_answer_ends_at_the_first_stop_word(lmms):
    assert lmms.cut(" two\n\nthree", ["\n\n", "ree"]) == "two"
    assert lmms.cut("\n\ntwo", ["\n\n", ""]) == "two"


def test_what_cannot_be_is_refused(lmms, checkpoint):
    with pytest.raises(UserError, match="frames, which casa does not know"):
        lmms.Casa(str(checkpoint), device="cpu", frames=3)
    with pytest.raises(NotImplementedError, match="one round"):
        lmms.Casa(str(checkpoint), device="cpu", batch_size="auto", max_batch_size=4).generate_until_multi_round([])
