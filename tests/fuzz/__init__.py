"""Random small decoders, each compared with itself: in lanes, on ranks with a KV cache, on ONNX devices."""
