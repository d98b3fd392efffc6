"""Writes the ONNX backend's device files."""
