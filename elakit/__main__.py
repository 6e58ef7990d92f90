"""``python -m elakit`` is the command ``elakit``."""

from elakit.cli import main

if __name__ == "__main__":
    main()
