"""A third backend: an interpreter of the lane graph in numpy. What docs/adding-a-backend.md speaks of."""
