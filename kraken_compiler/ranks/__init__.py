"""Processes that each run a lane: starting, watching and connecting them."""
