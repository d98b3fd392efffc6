"""Writes the torch backend's files."""
