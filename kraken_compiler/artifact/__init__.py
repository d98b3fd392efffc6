"""The artifact: a directory with everything needed to run a compiled model, checked by hashes, without pickles."""
