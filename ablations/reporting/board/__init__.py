"""What a grid looks like in TensorBoard."""
