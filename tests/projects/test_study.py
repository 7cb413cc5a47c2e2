"""A study in small: what is asked, runs that resume and are skipped, and a page that says what its records say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from casa.errors import UserError
from casa.evaluation.scenes import COLOURS
from casa.settings import build
from projects.study import page as pages
from projects.study.grid import Study, read_study
from projects.study.pictures import chart, read_pictures
from projects.study.records import COLUMNS, Difference, Records
from projects.study.run import is_done, record_path, train_run
from projects.study.scoring import score
from projects.study.shared import begin
from projects.study.tasks import SMALL, Sample, Writer, held_out

FOLDER = Path(pages.__file__).parent
BUDGET = {"steps": 20, "samples": 4, "warmup": 1, "most_turns": 2}
STUB = {
    "name": "stub",
    "shared": {
        "pictures": {split: {"pages": 24, "scenes": 24, "charts": 6} for split in ("train", "held_out")},
        "text": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
        "text_budget": {"steps": 4, "samples": 4},
        "vocabulary": 330,
    },
    "budget": BUDGET,
    "tasks": {
        "single": {"weights": {"pages": 1, "midway": 1}, "questions": {"pages": 6, "spoken": 4}},
        "several": {"weights": {"ago": 1, "between": 1}, "questions": {"ago": 4, "same": 4}},
    },
    "groups": [
        {"name": "one", "tasks": "single", "seeds": [1], "runs": {"casa": {}}, "inspect": ["casa"]},
        {"name": "two", "tasks": "several", "seeds": [1, 2], "grid": {"method": ["insertion"], "gist": [0, 2]}},
    ],
}


def study(**changes):
    return build(Study, json.loads(json.dumps(STUB | changes)), what="the study")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def beginning(folder):
    return begin(study(), folder)


def test_a_grid_is_all_combinations_seed_by_seed():
    names = [run.id for run in study().runs()]
    assert names == [
        "casa-seed-1",
        *("two-insertion-0-seed-1", "two-insertion-2-seed-1"),
        *("two-insertion-0-seed-2", "two-insertion-2-seed-2"),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": {"step": 3}}, "did you mean 'steps'"),
        ({"groups": [STUB["groups"][0], STUB["groups"][0]]}, "casa-seed-1"),
        ({"groups": [{**STUB["groups"][0], "tasks": "singel"}]}, "single"),
        ({"groups": [{**STUB["groups"][0], "inspect": ["cosa"]}]}, "casa"),
        ({"groups": [{**STUB["groups"][0], "runs": {}}]}, "runs or a grid"),
        ({"groups": [{**STUB["groups"][1], "grid": {"placment": ["before"]}}]}, "placement"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        study(**changes).runs()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_files_of_the_project_are_whole(path):
    if path.name != "claims.yaml":
        assert read_study(path).runs()
        return
    known = {run.name for run in read_study(FOLDER / "small.yaml").runs()}
    for section in yaml.safe_load(path.read_text(encoding="utf-8")):
        named = {*section["rows"], *(name for pair in section["compare"] for name in pair)}
        assert named <= known, section["id"]
        assert {*section["columns"], *section["compared_on"]} <= {*COLUMNS}, section["id"]


def test_charts_are_asked_about_as_they_are_drawn():
    for number in range(20):
        example = chart(np.random.default_rng(number), "train", 112)
        bars = example.meta["bars"]
        by_name, by_colour = {str(bar[0]): bar for bar in bars}, {bar[1]: bar for bar in bars}
        for turn in example.turns:
            said = re.findall(r"\w+", turn.question)
            names, colours = [w for w in said if w in by_name], [w for w in said if w in COLOURS]
            if turn.kind == "most":
                wanted = max(bars, key=lambda bar: bar[2])[1]
            elif turn.kind == "higher":
                one, other = (by_colour[colour] for colour in colours)
                wanted = "yes" if one[2] > other[2] else "no"
            else:
                (bar,) = [by_name[name] for name in names] + [by_colour[colour] for colour in colours]
                wanted = {"value": str(bar[2]), "named": str(bar[2]), "legend": bar[1], "owner": str(bar[0])}[turn.kind]
            assert turn.answer == wanted


@pytest.mark.slow
def test_samples_of_every_task_say_what_is_on_their_pictures(folder, beginning):
    bank, rng = read_pictures(folder / "pictures", "train", 112), np.random.default_rng(0)

    def said(picture):
        facts = bank[picture[0]].facts[picture[1]]
        return facts["lines"][0] if picture[0] == "numbers" else facts["shapes"][0][1]

    for name, task in SMALL.items():
        for _ in range(12):
            sample = task(bank, rng, 2)
            assert sample.kind.partition(".")[0] == name
            assert sum(part.count("<image>") for part in sample.parts) == len(sample.pictures)
            answer = sample.parts[-1].removesuffix("<end>")
            if name == "ago":
                assert answer == said(sample.pictures[-1 - int(sample.kind[-1])])
            elif name == "ordinal":
                assert answer == said(sample.pictures[int(sample.kind[-1]) - 1])
            elif name == "same":
                assert answer == ("yes" if said(sample.pictures[0]) == said(sample.pictures[2]) else "no")
            elif name == "between":
                assert answer == ", ".join(said(picture) for picture in sample.pictures)


@pytest.mark.slow
def test_pictures_stand_where_they_are_shown_and_gist_tokens_behind_them(beginning):
    sample = Sample(("<user>a<image><frame>b<end><assistant>", "cd<end>"), (("pages", 0),), "pages.line")
    plain = Writer(beginning.tokenizer).write(sample)
    names = beginning.tokenizer.convert_ids_to_tokens(plain.ids)
    assert names == ["<user>", "a", "<frame>", "b", "<end>", "<assistant>", "c", "d", "<end>"]
    assert plain.places == (2,)
    assert [name for name, learn in zip(names, plain.learn, strict=True) if learn] == ["c", "d", "<end>"]
    marked = Writer(beginning.tokenizer, [900, 901]).write(sample)
    assert marked.ids == (*plain.ids[:2], 900, 901, *plain.ids[2:])
    assert marked.places == (2,)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", [{}, {"method": "insertion"}, {"gist": 2}])
def test_right_is_what_greedy_decoding_says(beginning, fusion):
    run = study(groups=[{"name": "x", "tasks": "several", "runs": {"x": fusion}}]).runs()[0]
    model = beginning.model(run.fusion, 5).eval()
    writer = Writer(beginning.tokenizer, model.gist_ids)
    asked, wanted = [], []
    for number, sample in enumerate(held_out({"ago": 3, "same": 2, "pages": 3}, beginning.banks["held_out"], 1)):
        chat = writer.write(sample)
        inputs, _ = beginning.inputs([sample], [chat], "held_out", len(chat.ids))
        begins = chat.learn.index(True)
        inputs = {name: value for name, value in inputs.items() if name not in ("labels", "position_ids")}
        inputs["input_ids"] = inputs["input_ids"][:, :begins]
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=-1)[0, begins:].tolist()
        said = beginning.tokenizer.convert_ids_to_tokens(out if number % 2 else [out[0], (out[1] + 1) % 300])
        asked.append((sample, said))
        wanted.append(number % 2 == 1)

    class Given(Writer):
        def write(self, sample):
            chat = Writer.write(self, sample)
            begins = chat.learn.index(True)
            said = next(said for known, said in asked if known is sample)
            ids = tuple(beginning.tokenizer.convert_tokens_to_ids(said))
            return type(chat)(chat.ids[:begins] + ids, chat.learn[:begins] + (True,) * len(ids), chat.places)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("projects.study.shared.Writer", Given)
        assert score(model, beginning, [sample for sample, _ in asked]).exact == wanted


@pytest.mark.slow
def test_a_run_that_was_ended_goes_on_at_its_step(folder, beginning):
    chosen, stub = study().runs()[0], study()
    whole = train_run(stub, chosen, beginning, folder)
    assert is_done(folder, chosen)
    assert not (folder / "runs" / chosen.id).exists()
    assert {"commit", "versions", "seconds", "curve", "scores", "ablations", "attention"} <= set(whole)
    assert json.loads(record_path(folder, chosen).read_text()) == json.loads(json.dumps(whole))
    record_path(folder, chosen).unlink()
    seen = []

    def stop(self, args, state, control, **kwargs):
        seen.append(state.global_step)
        if len(seen) == 12:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("projects.study.training.Told.on_step_end", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train_run(stub, chosen, beginning, folder)
        again = train_run(stub, chosen, beginning, folder)
    # gone on with at the checkpoint of step 10
    assert seen == [*range(1, 13), *range(11, 21)]
    assert again["scores"] == whole["scores"]
    assert again["on_the_way"] == whole["on_the_way"]
    torch.testing.assert_close(torch.tensor(again["curve"]), torch.tensor(whole["curve"]))


def test_differences_are_paired_by_question_and_say_nothing_of_two_seeds(tmp_path):
    rng = np.random.default_rng(0)
    for name, better in (("a", 0.3), ("b", 0.0)):
        for seed in (1, 2, 3):
            hard = np.random.default_rng(7).random(200)
            bits = "".join("01"[int(value < 0.5 + better)] for value in hard + 0.02 * rng.standard_normal(200))
            record = {"run": {"name": name, "seed": seed}, "scores": {"charts.value": {"exact": bits}}}
            (tmp_path / f"{name}-seed-{seed}.json").write_text(json.dumps(record))
    records = Records(tmp_path)
    gap = records.difference("a", "b", "charts")
    assert gap is not None
    assert 0.2 < gap.low < gap.mean < gap.high < 0.4
    assert gap.reading == "better"
    nothing = records.difference("b", "b", "charts")
    assert nothing is not None
    assert nothing.reading == "no difference"
    assert Difference(0.3, 0.2, 0.4, (0.3, 0.3)).reading == "open: 2 of 3 seeds"
    assert Difference(0.3, 0.2, 0.4, (0.5, 0.5, -0.1)).reading == "unsettled, seeds differ"
    assert Difference(0.01, -0.05, 0.07, (0.0, 0.1, -0.1)).reading == "unsettled"
    assert records.difference("a", "none", "charts") is None
    section = {
        "rows": ["a", "b"],
        "compare": [["a", "b"]],
        "compared_on": ["charts"],
        "verdict": "A wins ({a - b on charts}).",
    }
    said = pages._verdict(records, section)
    assert said == f"A wins (+{100 * gap.mean:.1f}, +{100 * gap.low:.1f} to +{100 * gap.high:.1f})."
    assert pages._verdict(records, section | {"verdict": "{a - b on charts} and {itself of a}."}) is None, (
        "not looked at"
    )
    (tmp_path / "b-seed-3.json").unlink()
    assert pages._verdict(Records(tmp_path), section) is None, "two seeds say nothing"


def test_the_page_says_what_its_records_say():
    records, sections = Records(pages.RECORDS), pages.read_claims()
    written = pages.PAGE.read_text(encoding="utf-8")
    assert written == pages.text_of(records, sections, pages.RECORDS.name)
    for section in sections:
        for name in (f"{section['id']}.png", f"{section['id']}-curves.png"):
            assert (pages.RECORDS / name).is_file() == (f"study/{name}" in written)


def test_every_record_is_of_the_study_as_it_stands():
    known = {run.id: run for run in read_study(FOLDER / "small.yaml").runs()}
    for path in sorted(pages.RECORDS.glob("*-seed-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record["run"] == json.loads(json.dumps(known[path.stem].to_dict())), path.name
        assert re.fullmatch(r"[0-9a-f]{12}\+?", record["commit"]), path.name
        assert record["seconds"] > 0
        assert len(record["curve"]) == record["run"]["budget"]["steps"] // 10
