"""A lane program run in one process: the reference, the module that trains, the model of logits."""
