"""Give a lane program a KV cache: a step graph for prefill and decode, and a graph for its position tables."""
