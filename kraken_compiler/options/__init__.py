"""Options of the commands: one dataclass each is command line, config file, keywords and record."""
