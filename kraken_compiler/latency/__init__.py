"""Predicts how long a lane program takes on a machine, from its scheduled graph and a file of what the machine does."""
