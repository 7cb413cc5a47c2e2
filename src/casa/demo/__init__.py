"""What `casa demo` does, as functions: a run over the shipped film or a video of one's own."""

from casa.demo.report import DemoReport
from casa.demo.run import DemoFilm, run_demo, shipped_film

__all__ = ["DemoFilm", "DemoReport", "run_demo", "shipped_film"]
