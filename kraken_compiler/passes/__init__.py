"""The passes that turn a captured model into a lane program, in the order of `pipelines.py`."""
