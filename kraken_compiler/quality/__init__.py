"""The quality contract: measured costs of a changed form."""
