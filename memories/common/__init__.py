"""The machinery of matrix memories: their decays, their state, and the parts of a chunk form."""
