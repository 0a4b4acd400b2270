"""A grid's cells side by side in TensorBoard, and their means over seeds."""
