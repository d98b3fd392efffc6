"""Sums over ranks: one interface, `Communicator`, and its kinds."""
