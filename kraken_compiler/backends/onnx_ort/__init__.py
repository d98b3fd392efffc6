"""The ONNX backend: one model per device, run by stock ONNX Runtime."""
