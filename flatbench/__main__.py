"""``python -m flatbench``: the command line."""

from flatbench.cli import main

if __name__ == "__main__":
    main()
