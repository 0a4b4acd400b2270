"""Ablations: grids of training runs, their runner, statistics, tables and plots."""
