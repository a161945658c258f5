"""Benches, each a subcommand of `python -m qlab.bench`: what a claim of this project is measured
with."""
