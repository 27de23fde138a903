"""The passes over a graph, one file each; the targets list them."""
