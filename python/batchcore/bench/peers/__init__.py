"""batchcore beside its peers: the same workloads, interleaved in one run, ratios in pairs.

`python -m batchcore.bench.peers --help` says how. A peer is whatever else runs models on llama.cpp:
upstream's own programs (CONTRIBUTING.md says how to build them), and other Python packages.
"""
