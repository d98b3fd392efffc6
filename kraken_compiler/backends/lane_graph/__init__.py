"""What several backends write and run: the graph of a lane as a file, its weights, its collectives and its schedule."""
