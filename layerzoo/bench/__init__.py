"""Paired benchmarks of ops and layers against peers: `layerzoo bench`."""
