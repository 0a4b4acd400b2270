"""Training: modules, callbacks, checkpoints and the Lightning CLI."""
