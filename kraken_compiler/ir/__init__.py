"""The records every part of the compiler shares. This package imports nothing of ours."""
