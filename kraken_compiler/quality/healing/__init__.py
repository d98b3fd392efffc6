"""Self-distillation: a rewritten model is trained until it says what its source says."""
