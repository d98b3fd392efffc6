"""Running compiled models: starting ranks, watching them, generating text."""
