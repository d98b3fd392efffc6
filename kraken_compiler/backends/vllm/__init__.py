"""The vLLM backend: the lane programs as a model of the serving engine vLLM."""
