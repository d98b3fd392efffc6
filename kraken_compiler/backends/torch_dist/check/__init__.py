"""Checks of torch programs: the operations that really run between a reduce's start and its wait."""
