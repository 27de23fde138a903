"""Serving: a Triton model repository of a run, checked before it takes its name.

Nothing is imported here: the lint needs none of what writing a repository needs.
"""
