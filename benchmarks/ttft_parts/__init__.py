"""What `benchmarks/ttft.py` is made of; it is run from there."""
