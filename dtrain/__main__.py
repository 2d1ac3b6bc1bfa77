"""``python -m dtrain``: the same as the ``dtrain`` command."""

from dtrain.cli import main

if __name__ == "__main__":
    main()
