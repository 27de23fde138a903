"""Search: which format each layer gets. Strategies share one interface (search/stage.py)."""
