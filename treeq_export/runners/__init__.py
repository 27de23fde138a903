"""Runners: one calling convention over every runtime; none is touched before it is entered."""
