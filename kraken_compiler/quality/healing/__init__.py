"""Self-distillation: a rewritten model is trained to give the logits of its source."""
