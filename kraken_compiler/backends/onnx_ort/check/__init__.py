"""Checks of devices: the operations that really run between a reduce's start and its wait, and the reference."""
