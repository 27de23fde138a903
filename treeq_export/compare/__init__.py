"""Comparison of strategies, budgets and trainings: one table, one run folder per cell."""
