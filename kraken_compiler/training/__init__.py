"""Training of lane programs: steps of an optimizer, in one process or on ranks, that can be killed and go on."""
