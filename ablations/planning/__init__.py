"""What a grid will take, before it runs."""
