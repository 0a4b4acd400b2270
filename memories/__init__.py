"""Memory layers: one file per rule."""
