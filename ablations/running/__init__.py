"""Runs cells: their folders, processes and display."""
