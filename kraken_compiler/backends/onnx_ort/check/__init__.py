"""What devices really run between the start and the wait of a reduce, and what they are compared with."""
