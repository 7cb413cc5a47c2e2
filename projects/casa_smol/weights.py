"""The trained page encoder as a file: written from a run, read by whoever builds on it.

    python -m projects.casa_smol.weights runs/page-encoder        export the run's averaged weights

BatchNorm is worked into the convolutions and weights are kept in bfloat16. Beside them a JSON says how they came
about and what they read. The optimiser's state stays in the run's folder.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from casa.atomic import replacing, write_text
from casa.provenance import provenance
from casa.vision.page_encoder import PageEncoder, PageEncoderConfig
from projects.casa_smol.encoder import Learner, Run, Settings, scores

WEIGHTS = Path(__file__).with_name("weights") / "page_encoder.safetensors"
SCORED_PAGES = 120
KEPT = ("characters", "stem_sizes", "hidden_size", "dilations", "image_mean", "image_std", "reads")


def page_encoder(file: Path = WEIGHTS, **config: Any) -> PageEncoder:
    """The trained encoder, float32, in eval mode. config: token_size, token_parts, bounds, as one likes."""
    told = json.loads(file.with_suffix(".json").read_text())
    encoder = PageEncoder(PageEncoderConfig(**told["encoder"] | config))
    encoder.load_state_dict(load_file(file))
    return encoder.eval()


def averaged(folder: Path) -> tuple[Learner, Settings, dict[str, Any]]:
    """A run's averaged weights in eval mode, its settings, and its checkpoint."""
    kept = torch.load(folder / "checkpoint.pt", weights_only=True)
    settings = Settings(**kept["settings"])
    average = Run.start(settings).average
    average.load_state_dict(kept["average"])
    return average.eval(), settings, kept


def export(folder: Path, file: Path = WEIGHTS, pages: int = SCORED_PAGES) -> dict[str, Any]:
    """Writes the averaged weights of a run, and what they score on pages of held-out fonts and words; returns that."""
    average, settings, kept = averaged(folder)
    reader = average.reader()
    state = {name: tensor for name, tensor in reader.state_dict().items() if tensor.is_floating_point()}
    file.parent.mkdir(exist_ok=True)
    with replacing(file) as path:
        save_file({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}, path)
    told: dict[str, Any] = {"encoder": {name: getattr(reader.config, name) for name in KEPT}}
    told |= {"steps": kept["step"], "cpu_seconds": kept["seconds"], "settings": kept["settings"]} | provenance()
    asked = replace(settings, score_pages=pages)
    told["scores"] = {
        name: scores(average, asked, split, worn)
        for name, split, worn in (
            ("held_out", "held_out", 1.0),
            ("held_out_clean", "held_out", 0.0),
            ("seen", "train", 1.0),
        )
    }
    write_text(file.with_suffix(".json"), json.dumps(told, indent=1) + "\n")
    return told


def main(arguments: list[str]) -> int:
    """Exports a run."""
    parser = argparse.ArgumentParser(description="Exports the page encoder of a run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    given = parser.parse_args(arguments)
    print(json.dumps(export(given.run, given.out)["scores"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
