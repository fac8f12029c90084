"""`python -m batchcore` is the `batchcore` command."""

from batchcore.cli import main

if __name__ == "__main__":
    main()
