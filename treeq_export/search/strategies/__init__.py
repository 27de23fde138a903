"""Strategies: how a search looks for the best formats within its budget."""
