"""Processes that run a lane each: starting, watching and connecting them."""
