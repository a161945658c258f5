"""The demo model and text."""

from qlab.demo.build import demo_model, demo_text

__all__ = ["demo_model", "demo_text"]
