"""All lanes in one process."""
