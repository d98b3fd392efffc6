"""Runs a rank's torch program."""
