"""What the cells of a grid say together."""
