"""Naming the first layer that is out of bounds.

`own` looks at every layer alone; where only the whole network can be run, such as an engine,
`network` searches the graph with as few runs as it can.
"""
