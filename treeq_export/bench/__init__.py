"""The bench stage: speed and memory of every target beside full precision and a peer.

One record with all raw times; terminal, JSON and HTML are views of it. A ratio comes from one
interleaved run and carries its 95 % interval. The processes that measure memory import one runtime
only, so nothing is imported here.
"""
