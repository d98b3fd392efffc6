"""Runs a device file with ONNX Runtime. Imports no torch."""
