"""Kinds of measurement: one class for each thing that a search measures."""
