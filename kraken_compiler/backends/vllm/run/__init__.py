"""Runs lane programs inside the processes of vLLM; imported by no others."""
