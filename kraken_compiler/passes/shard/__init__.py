"""Decide which part of every tensor belongs to which lane, and cut the graph to one lane."""
