"""The network: load a checkpoint, call it, find its linears, sample from it."""
