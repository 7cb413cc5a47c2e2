"""Tries casa-tiny under lmms-eval itself, on tasks made here: answers, likelihoods, several pictures, a film.

It wants an environment of its own, since lmms-eval asks for older versions of some packages:

    python -m venv trial && trial/bin/pip install ".[lmms]" matplotlib
    trial/bin/python tests/evaluation/lmms_trial.py

It runs `lmms-eval --model casa` as a user does, with batches of four, and compares every answer with that of
`casa.load("casa-tiny")` asked by itself. The suite has the same adapter over a stub (test_lmms.py).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TASK = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_visual: !function functions.pictures
doc_to_text: !function functions.question
doc_to_target: answer
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""
ANSWERED = TASK + 'output_type: generate_until\ngeneration_kwargs: {{max_new_tokens: 16, until: ["\\n\\n"]}}\n'
CHOSEN = TASK + 'output_type: multiple_choice\ndoc_to_choice: choices\ntarget_delimiter: ""\n'
FUNCTIONS = """\
from PIL import Image

def pictures(doc):
    return [path if path.endswith(".mp4") else Image.open(path).convert("RGB") for path in doc["shown"]]

def question(doc):
    return doc["question"]
"""


def make(folder: Path) -> dict[str, list[dict]]:
    """Three tasks in a folder, and their rows."""
    from casa.evaluation import page
    from casa.media import VideoWriter

    drawn = [page(np.random.default_rng(number), "held_out", turns=2, max_side=224) for number in range(6)]
    for number, one in enumerate(drawn):
        one.image.save(folder / f"{number}.png")
    with VideoWriter(folder / "film.mp4", drawn[0].image.size, fps=2) as film:
        for _ in range(8):
            film.write(np.asarray(drawn[0].image))
    rows = [
        {"shown": [str(folder / f"{number}.png")], "question": turn.question, "answer": turn.answer}
        for number, one in enumerate(drawn)
        for turn in one.turns
    ]
    several = [
        {"shown": [str(folder / "0.png"), str(folder / "1.png")], "question": "Read line 1.", "answer": ""},
        {"shown": [str(folder / "film.mp4")], "question": "Read line 1.", "answer": ""},
    ]
    chosen = [row | {"choices": [row["answer"], "88888", "0"]} for row in rows]
    tasks = {"casa_answered": (ANSWERED, rows), "casa_several": (ANSWERED, several), "casa_chosen": (CHOSEN, chosen)}
    (folder / "functions.py").write_text(FUNCTIONS)
    for name, (text, kept) in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in kept))
        metric = "acc" if text is CHOSEN else "exact_match"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n" + text.format(data=data, metric=metric))
    return {name: kept for name, (_, kept) in tasks.items()}


def asked(row: dict) -> str:
    """What the model says to a row alone."""
    import casa
    from casa.data.frames import video_frames
    from casa.data.pictures import open_one

    pictures = []
    for path in row["shown"]:
        film = path.endswith(".mp4")
        pictures += map(open_one, video_frames(Path(path), 1.0, 0.0, None, 4096, 32, True)) if film else [path]
    return casa.load("casa-tiny").ask(pictures, row["question"], max_new_tokens=16)


def main() -> None:
    """Runs the tasks and compares."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = make(folder)
        command = [sys.executable, "-m", "lmms_eval", "--model", "casa", "--model_args", "pretrained=casa-tiny"]
        command += ["--tasks", ",".join(rows), "--include_path", str(folder), "--batch_size", "4"]
        command += ["--output_path", str(folder / "out"), "--log_samples"]
        subprocess.run(command, check=True)
        for task, wanted in rows.items():
            [path] = (folder / "out").rglob(f"*_samples_{task}.jsonl")
            samples = {line["doc_id"]: line for line in map(json.loads, path.read_text().splitlines())}
            assert len(samples) == len(wanted), (task, len(samples))
            if task == "casa_chosen":
                accuracy = sum(line["acc"] for line in samples.values()) / len(samples)
                print(f"{task}: {accuracy:.2f} right")
                assert accuracy > 0.7
                continue
            for number, row in enumerate(wanted):
                found = samples[number]["filtered_resps"]
                found = found[0] if isinstance(found, list) else found
                assert found == asked(row), (task, number, found)
            print(f"{task}: all {len(wanted)} answers are those of the model asked by itself")


if __name__ == "__main__":
    main()
