"""Attention layers: one file per layer."""
