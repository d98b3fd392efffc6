"""Reading and writing large tensors: past the page cache, hashed, in the safetensors format."""
