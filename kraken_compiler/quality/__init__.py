"""What a changed form costs: the quality contract."""
