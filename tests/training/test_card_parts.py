"""What cards of all kinds of runs share: front matter, and a picture that may be missing."""

import yaml

from casa.errors import UserError
from casa.training.card_parts import curve, front, write_parts

HISTORY = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_the_front_is_what_the_hub_reads():
    found = yaml.safe_load(front(base_model="owner/name").strip("-"))
    assert found == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["casa"],
        "base_model": "owner/name",
    }


def test_a_card_without_its_picture_is_a_card(tmp_path, monkeypatch):
    assert curve(tmp_path, HISTORY, "mine", "The loss") == "![The loss](loss.png)"
    assert (tmp_path / "loss.png").exists()

    def missing(*_):
        raise UserError("Plots need matplotlib.")

    monkeypatch.setattr("casa.training.card_parts.draw_curve", missing)
    write_parts(tmp_path, [front(), curve(tmp_path, HISTORY, "mine", "The loss"), "# mine"])
    assert (tmp_path / "README.md").read_text() == f"{front()}\n\n# mine\n"
