"""The commands as functions: what each does, from its options to its result."""
