"""Which lane gets what: the heads and columns that read most of each other, for a form in which lanes read late."""
