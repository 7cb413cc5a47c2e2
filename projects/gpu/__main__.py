"""`make gpu`: what is tested and measured where there is a GPU, within nine minutes, on a machine that has only torch,
transformers, triton and what the core of this library names. Nothing is fetched.

Each part is a process of its own with its own limit. One that fails or takes too long is told, and the others go on;
what a part writes lies in `gpu-PART.json`, and what became of all in `gpu-run.json`.

    python -m projects.gpu                  all parts
    python -m projects.gpu attention train  these
    python -m projects.gpu --rehearse       the same commands on tiny shapes, on a CPU
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from casa.atomic import write_text
from casa.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 530.0  # s for all parts
REHEARSED = 10  # times as long may a part take on a CPU
TAIL = 4000  # characters of a part's last output that are kept
BENCH = "-m casa bench"


class Part(NamedTuple):
    """command: what python is given. tiny: what is added in a rehearsal, where a later option takes the place of an
    earlier one; TINY is the folder of a tiny language model. writes: whether it takes --device and --out.
    """

    name: str
    seconds: float
    command: str
    tiny: str
    writes: bool = True


# a frame of 896 px, of which 16 tokens are said, as the official release measures it
TURNS = f"{BENCH} peers --samples 2 --tokens 16 --image-tokens 1024"
TINY_TURNS = "--shape tiny --turns 1,3 --image-tokens 6 --tokens 2 --samples 1"
PARTS = (
    Part("tests", 150, "-m pytest tests/gpu -n 0 -q", "-k packed_is_each_sample_alone", writes=False),
    Part("attention", 60, f"{BENCH} attention", "--repeats 1 --impls sdpa"),
    Part("turns-helium-2b", 110, f"{TURNS} --shape helium-2b --turns 1,64,256,512", TINY_TURNS),
    Part("turns-qwen2_5-vl-3b", 80, f"{TURNS} --shape qwen2_5-vl-3b --turns 1,64,256", TINY_TURNS),
    Part(
        "train",
        150,
        # the paper's packed batch, in 16 samples
        f"{BENCH} train --parts memory --shape helium-2b --text-tokens 2048 --image-tokens 5120,20480 --samples 16 "
        "--methods casa,update_images,cross_attention,insertion",
        "--shape tiny --text-tokens 32 --image-tokens 16,32 --methods casa,insertion",
    ),
    Part("decode", 60, f"{BENCH} decode", "--backbone TINY --prompt 8 --tokens 1 --rounds 1 --rows 1"),
    Part(
        "peers",
        70,
        f"{BENCH} peers --turns 1,64,256 --samples 2",
        "--backbone TINY --turns 1 --samples 1 --tokens 2",
    ),
)


def run_part(part: Part, out: Path, limit: float, tiny: Path | None) -> dict[str, object]:
    """What became of a part: status ("done", "failed" or "too slow"), seconds, and the end of what it said.

    tiny: in a rehearsal, the folder of a tiny language model.
    """
    words = f"{part.command} {'' if tiny is None else part.tiny}".split()
    command = [sys.executable, *(str(tiny) if word == "TINY" else word for word in words)]
    if part.writes:
        command += ["--device", "cuda" if tiny is None else "cpu", "--out", str(out / f"gpu-{part.name}.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
    environment |= {} if tiny is None else {"CASA_GPU_TESTS": "cpu"}
    begun = time.monotonic()
    # a session of its own, so that the processes a part has started end with it
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            said, _ = process.communicate(timeout=limit)
            status = "done" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "too slow"
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
    text = said.decode(errors="replace")[-TAIL:]
    return {"status": status, "seconds": round(time.monotonic() - begun, 1), "limit": round(limit, 1), "said": text}


def stamp(path: Path, commit: str) -> None:
    """Writes the commit into a record of a machine on which the files are no checkout."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["commit"] is None:
        write_text(path, json.dumps(record | {"commit": commit}, indent=2) + "\n")


def run(
    parts: Sequence[Part], out: Path, total: float, tiny: Path | None = None, commit: str | None = None
) -> dict[str, dict[str, object]]:
    """Every part in turn; `gpu-run.json` is written after each, so that nothing is lost if the machine goes."""
    out.mkdir(parents=True, exist_ok=True)
    ends, found = time.monotonic() + total, {}
    facts = {"seed": 0, **provenance("cuda" if tiny is None else "cpu")}
    facts["commit"] = facts["commit"] or commit
    for part in parts:
        left = ends - time.monotonic()
        if left <= 0:
            found[part.name] = {"status": "no time left"}
        else:
            found[part.name] = run_part(part, out, min(part.seconds * (1 if tiny is None else REHEARSED), left), tiny)
            if commit is not None and (path := out / f"gpu-{part.name}.json").exists():
                stamp(path, commit)
            print(f"--- {part.name}: {found[part.name]['status']}\n{found[part.name]['said']}", flush=True)
        write_text(out / "gpu-run.json", json.dumps({**facts, "parts": found}, indent=2) + "\n")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all parts are done."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"Which parts: {', '.join(names)}; all if left out.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="Folder of the results.")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="For all parts together.")
    parser.add_argument("--commit", help="What results are of, where the files are no checkout.")
    parser.add_argument("--rehearse", action="store_true", help="Tiny shapes on a CPU.")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.parts if name not in names]:
        parser.error(f"there is no part {unknown[0]!r}; choose among: {', '.join(names)}")
    if not given.rehearse:
        import torch

        if not torch.cuda.is_available():
            parser.error("torch sees no CUDA device; --rehearse runs the same commands on tiny shapes")
    chosen = [part for part in PARTS if not given.parts or part.name in given.parts]
    with TemporaryDirectory() as folder:
        tiny = Path(folder) if given.rehearse else None
        if tiny is not None:
            from casa.testing import tiny_text_model

            tiny_text_model().save_pretrained(tiny)
        found = run(chosen, given.out, given.seconds, tiny, given.commit)
    print("\n".join(f"{name:20} {each['status']:12} {each.get('seconds', '')}" for name, each in found.items()))
    return 0 if all(each["status"] == "done" for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
