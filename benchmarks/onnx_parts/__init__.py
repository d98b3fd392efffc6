"""The parts of `benchmarks/onnx.py`; the others it shares with `benchmarks/ttft.py`."""
