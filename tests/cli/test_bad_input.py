"""What a user can get wrong: one plain sentence on stderr, status 2, no traceback, nothing half-written.

Bad files have names that say nothing of what is wrong, so that a sentence can only be right by its own words.
"""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from casa.errors import UserError
from casa.media import VideoWriter
from casa.models.loading import shipped
from casa.testing import claimed_png

NO_PICTURE = "{file} cannot be read as a picture, or its beginning is damaged: save it as PNG or JPEG."
CUT = "{file} is damaged or cut off: copy or download the picture again."
HUGE = "{file} has more than 64 megapixels: make it smaller first."
THIN = "{file} is 804 x 4, longer than 200 times its width: crop it."
# what a file holds: what is said of it where a picture is wanted, and where a video is; None if it is read
FILES = {
    "no file": (
        "There is no file {file}: check the name of the picture.",
        "There is no file {file}: check the name of the video.",
    ),
    "nothing": (
        "{file} is empty: copy or download the picture again.",
        "{file} is empty: copy or download the video again.",
    ),
    "text": (
        "{file} is a text file, not a picture: name a picture file.",
        "{file} is a text file, not a video: name a video file.",
    ),
    "half a picture": (CUT, CUT),
    "a huge picture": (HUGE, HUGE),
    "a thin picture": (THIN, THIN),
    "half a film": (
        NO_PICTURE,
        "{file} is no video that can be read, or is damaged or cut off: copy it again or convert it.",
    ),
    "a film": (NO_PICTURE, None),
    "a picture": (None, None),
}
MODELS = {
    "nowhere": "there is no model at '{model}'; give a folder, or one of: " + ", ".join(shipped()) + ".",
    "a name with a slip": "there is no model at '{model}'; give a folder, or one of: " + ", ".join(shipped()) + ".",
    "a file": "{model} is a file; give the folder that save_pretrained wrote.",
    "a folder without a model": "{model} has no config.json; give the folder that save_pretrained wrote.",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The path of a file by what it holds, as a.png, b.png, ...; each is there as .mp4 too."""
    folder = tmp_path_factory.mktemp("files")
    pixels = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    Image.new("RGB", (804, 4)).save(folder / "thin.png")
    with VideoWriter(folder / "film.mp4", (80, 80), fps=10) as writer:
        for _ in range(10):
            writer.write(pixels)
    picture, thin, film = ((folder / name).read_bytes() for name in ("picture.png", "thin.png", "film.mp4"))
    contents = {
        "nothing": b"",
        "text": b"words in a row\n" * 10,
        "half a picture": picture[:400],
        "a huge picture": claimed_png(60_000, 60_000),
        "a thin picture": thin,
        "half a film": film[: len(film) // 2],
        "a film": film,
        "a picture": picture,
    }
    found = {holds: folder / f"{letter}.png" for letter, holds in zip("abcdefghi", FILES, strict=True)}
    for holds, content in contents.items():
        for ending in (".png", ".mp4"):
            found[holds].with_suffix(ending).write_bytes(content)
    return found


@pytest.fixture
def out(tmp_path):
    """A folder for what a verb writes; at the end no file is in it."""
    folder = tmp_path / "out"
    folder.mkdir()
    yield folder
    assert not [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def changed(checkpoint, tmp_path):
    """A copy of a model's folder, to be spoiled."""
    return shutil.copytree(checkpoint, tmp_path / "changed")


def line(verb, model, file, out):
    """The arguments with which a verb reads a model and a file, and writes whatever it can."""
    return {
        "ask": ("ask", model, file, "what?"),
        "caption": ("caption", model, file, "--out", out / "a.srt", "--burn", out / "a.mp4"),
        "demo": ("demo", "--model", model, "--video", file, "--out", out, "--record", out / "a.json"),
        "eval": ("eval", model, "--tasks", "stream", "--limit", 1, "--out", out / "a.json"),
    }[verb]


def assert_sentence(result, *words: str, said: str = "") -> None:
    assert result.status == 2
    assert result.out == said
    assert result.err.startswith("casa: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["ask", "caption", "demo"])
@pytest.mark.parametrize("holds", FILES)
def test_files_that_are_not_what_they_seem(casa, files, out, verb, holds):
    sentence = FILES[holds][verb != "ask"]
    if sentence is None:
        sentence = MODELS["nowhere"].format(model="./nowhere")
    file = files[holds].with_suffix(".png" if verb == "ask" else ".mp4")
    # no model is there either, which is found out later: a wrong file costs no time
    result = casa(*line(verb, "./nowhere", file, out))
    said = "Loading ./nowhere ...\n" if verb == "demo" and "no model" in sentence else ""
    assert_sentence(result, f"casa: {sentence.format(file=file)}\n", said=said)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["ask", "caption", "demo", "eval"])
@pytest.mark.parametrize("kind", MODELS)
def test_models_that_are_none(casa, files, out, tmp_path, verb, kind):
    model = {
        "nowhere": tmp_path / "nowhere",
        "a name with a slip": "casa-tinny",
        "a file": files["a film"],
        "a folder without a model": tmp_path,
    }[kind]
    result = casa(*line(verb, model, files["a picture"], out))
    said = f"Loading {model} ...\n" if verb == "demo" else ""
    # what comes before a picture in `casa ask` is another picture, if it is a file
    sentence = MODELS[kind] if (verb, kind) != ("ask", "a file") else FILES["a film"][False]
    assert_sentence(result, f"casa: {sentence.format(model=model, file=model)}\n", said=said)


@pytest.mark.slow
@pytest.mark.parametrize("holds", ["a film", "a picture"])
@pytest.mark.parametrize("fps", ["0", "-1", "nan", "inf"])
def test_rates_that_are_none(casa, files, out, holds, fps):
    result = casa(*line("caption", "./nowhere", files[holds], out), "--fps", fps)
    assert_sentence(result, f"casa: --fps is {float(fps)}: give a number of frames per second above 0.\n")


def test_captions_of_an_unknown_kind(casa, files, out):
    result = casa("caption", "./nowhere", files["a film"], "--out", out / "a.txt")
    assert_sentence(result, f"casa: {out / 'a.txt'} has no known ending; use .srt, .vtt, .jsonl.\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "1 are missing from it, the first is casa_layers.0.q_proj.weight;"),
        ("surplus", "1 are in it and not in the model, the first is casa_layers.9.q_proj.weight;"),
        ("misshapen", "1 have another shape in it, the first is casa_layers.0.q_proj.weight;"),
    ],
)
def test_checkpoints_with_other_weights(casa, changed, files, change, words):
    weights = load_file(changed / "model.safetensors")
    name = "casa_layers.0.q_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "surplus":
        weights["casa_layers.9.q_proj.weight"] = weights[name].clone()
    else:
        weights[name] = weights[name][:3].clone()
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    result = casa("ask", changed, files["a picture"], "what?")
    assert_sentence(result, f"the weights in {changed} do not fit this model", words, "use a checkpoint saved with")


def test_a_config_of_nonsense(casa, checkpoint, changed, files):
    (changed / "config.json").write_text("{not json")
    result = casa("ask", changed, files["a picture"], "what?")
    assert_sentence(result, f"{changed} cannot be loaded: ", "is not a valid JSON file")
    config = json.loads((checkpoint / "config.json").read_text())
    config["fusion"]["placment"] = "before"
    (changed / "config.json").write_text(json.dumps(config))
    result = casa("ask", changed, files["a picture"], "what?")
    assert_sentence(result, "Unknown key 'placment' in fusion; did you mean 'placement'?")


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{% if %}", b"\xff"])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"]
)
def test_a_damaged_processor(casa, changed, files, name, content):
    assert (changed / name).is_file()
    (changed / name).write_bytes(content)
    result = casa("ask", changed, files["a picture"], "what?", "--max-new-tokens", 1)
    if name == "chat_template.jinja" and content in (b"", b"{", b"[]"):
        # a template, though one that shows no picture
        wanted = "the chat template wrote 0 places for 1 pictures" if content else "there is no chat template"
        assert_sentence(result, wanted)
    else:
        assert_sentence(result, f"{changed} has no processor that can be read (", "fetch its files again")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("sed: 3\n", "did you mean 'seed'?"),
        (
            "!!python/object/apply:os.system ['touch hacked']\n",
            "holds a YAML tag that could run code (line 1); a recipe may hold plain values only.",
        ),
        ("a: [1\n", "is not valid YAML near line 2; mend it there."),
        (None, "There is no recipe"),
    ],
)
def test_recipes(casa, tmp_path, out, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_text(content)
    assert_sentence(casa("train", recipe, "--out", out / "run"), words, str(recipe))
    assert {path.name for path in tmp_path.iterdir()} <= {"recipe.yaml", "out"}
    assert not any(out.iterdir())


def test_tasks_devices_and_words(casa, checkpoint, files, out):
    picture = files["a picture"]
    scores = ("--out", out / "a.json")
    assert_sentence(casa("eval", checkpoint, "--tasks", "pagse", *scores), "no task 'pagse'; did you mean 'pages'?")
    assert_sentence(casa("eval", checkpoint, "--limit", 0, *scores), "The limit is 0; it must be 1 or more.")
    device = casa("ask", checkpoint, picture, "what?", "--device", "tpu")
    assert_sentence(device, "device 'tpu' is not known; use auto, cpu, cuda or mps.")
    assert_sentence(casa("ask", "one"), "ask takes a picture and a question: casa ask")
    assert_sentence(casa("bench", "attention", "--impls", "spda"), "cannot time 'spda'; known are reference, sdpa,")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("stream", "--fps", 0), "--fps is 0.0; it must be above 0 and finite."),
        (("live", "--minutes", "inf"), "--minutes is inf; it must be above 0 and finite."),
        (("memory", "--short", 70), "--short is 70.0, and --minutes 60.0; give it less than that."),
        (("memory", "--fps", 30), "--fps is 30.0, and --film-fps 25.0; give no more than that."),
        (("stream", "--tokens", 4, "--sessions", 2), "--tokens and --sessions are two measurements; give one of them."),
        (("stream", "--plot", "a.png"), "--plot is for --tokens; add it, or leave --plot out."),
        (("soak", "--resume"), "--resume goes on with a soak that was writing --out; name that file."),
    ],
)
def test_benchmarks_that_cannot_be(casa, arguments, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert_sentence(casa("bench", *arguments), f"casa: {sentence}\n")


def test_debug_shows_the_traceback(casa, checkpoint, files):
    with pytest.raises(ValueError, match="is empty: copy or download the picture again"):
        casa("ask", checkpoint, files["nothing"], "what?", "--debug")


class OutOfMemoryError(RuntimeError):
    """By the name of torch's for GPUs."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=["Python", "GPU", "CPU"],
)
def test_memory_that_runs_out(casa, monkeypatch, error):
    def fail(arguments):
        raise error

    monkeypatch.setattr("casa.cli.main.app", fail)
    assert_sentence(casa("ask"), "not enough memory")
    with pytest.raises(type(error)):
        casa("ask", "--debug")


def test_an_error_of_the_program_itself_keeps_its_traceback(casa, monkeypatch):
    def fail(arguments):
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr("casa.cli.main.app", fail)
    with pytest.raises(RuntimeError, match="shape"):
        casa("ask")


@pytest.mark.parametrize(
    ("verb", "sentence", "fields", "wanted"),
    [
        ("caption", "max_text_tokens is 0; give 1.", "max_text_tokens", "--max-text-tokens is 0; give 1."),
        ("caption", "go on with resume=True, or name another out.", ("resume", "out"), "go on with --resume, or name"),
        ("caption", "cue='said' is for live pace.", "cue", "--cue said is for live pace."),
        ("caption", "leave out live=False.", ("live",), "leave out --every-frame."),
        ("train", "data.fps is 0; give 1.", "fps", "data.fps is 0; give 1."),
        ("ask", "temperature is -1; retemperature it.", "temperature", "--temperature is -1; retemperature it."),
        ("caption", "the fps are odd.", (), "the fps are odd."),
    ],
)
def test_fields_of_an_error_are_told_as_options(casa, monkeypatch, verb, sentence, fields, wanted):
    def fail(program, arguments):
        raise UserError(sentence, field=fields)

    monkeypatch.setattr("typer.Typer.__call__", fail)
    assert_sentence(casa(verb, "words"), f"casa: {wanted}")
