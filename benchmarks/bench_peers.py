"""Patching sweeps by subcircuit beside plain torch, transformers, nnsight, TransformerLens 3 and 4, and pyvene.

The same as `subcircuit bench`, whose options it takes; without any it measures every scenario and writes the figures
of docs/benchmarks.md to runs/bench. `make peers` installs the peers; those that are absent are skipped.

    python benchmarks/bench_peers.py [--scenario all --out runs/bench]
"""

from __future__ import annotations

import sys

from subcircuit.cli import main

if __name__ == "__main__":
    sys.argv = ["subcircuit", "bench", *(sys.argv[1:] or ("--scenario", "all", "--out", "runs/bench"))]
    main()
