"""Writes what vLLM needs of an artifact. Knows nothing of vLLM."""
