"""Spell each thing one way. These passes keep the numbers."""
