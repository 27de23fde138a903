"""The targets: each module is one kind of compiled graph, what makes, checks and runs it."""
