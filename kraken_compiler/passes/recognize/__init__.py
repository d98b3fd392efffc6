"""Find the residual stream, the layers and the branches. These passes only look."""
