"""From a module to a program: what a block is called with, what it runs, and programs that are
shared."""
