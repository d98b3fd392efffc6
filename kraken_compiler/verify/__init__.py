"""Checks that what was emitted computes what it must: the program contract, the schedule, and the report of both."""
