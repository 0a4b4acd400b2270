"""The commands beside training: list, check, describe, bench, generate, convert and evaluate."""
