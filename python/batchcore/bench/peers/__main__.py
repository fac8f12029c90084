"""`python -m batchcore.bench.peers` runs the comparison."""

from batchcore.bench.peers.cli import main

if __name__ == "__main__":
    main()
