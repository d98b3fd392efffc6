"""The commands as functions: what each can be asked for, and what it does."""
