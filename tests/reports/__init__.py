"""Models and files of the kinds that public bug reports describe: exact, or refused in one line. One file per kind."""
