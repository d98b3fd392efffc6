"""Ranks that are threads, for device programs that are run together in a test."""

from kraken_compiler.communicators.threads import ThreadCollectives, together

__all__ = ["ThreadCollectives", "together"]
