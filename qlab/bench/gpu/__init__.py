"""The acceptance of a GPU in one command: steps in order of value, planned to fit the minutes
given, every result written when it exists, and a table against the goals."""
