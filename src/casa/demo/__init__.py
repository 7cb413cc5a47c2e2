"""What `casa demo` does, as functions: the shipped clip and how it was filmed, and a run over a video."""

from casa.demo.clip import Clip, shipped_clip
from casa.demo.report import DemoReport
from casa.demo.run import run_demo

__all__ = ["Clip", "DemoReport", "run_demo", "shipped_clip"]
