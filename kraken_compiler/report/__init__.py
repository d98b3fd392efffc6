"""One page about an artifact: what was compiled, what it costs, and where its time goes. Needs no network."""
