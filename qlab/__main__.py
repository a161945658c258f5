"""`python -m qlab` is the `qlab` command."""

from qlab.cli import main

if __name__ == "__main__":
    main()
