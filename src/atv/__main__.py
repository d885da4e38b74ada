"""``python -m atv``: the same as the command ``atv``."""

from atv.cli import main

if __name__ == "__main__":
    main()
