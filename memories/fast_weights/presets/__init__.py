"""Published rules of fast weights: named points in the space of `FastWeights`."""
