"""Runs the same programs without vLLM, to compare them with the lanes."""
