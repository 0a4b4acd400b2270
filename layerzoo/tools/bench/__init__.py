"""Paired benchmarks of ops and layers against peers: `layerzoo bench`."""

from layerzoo.tools.bench import adapters as adapters  # which register themselves
