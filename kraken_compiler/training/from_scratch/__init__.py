"""Training of Kraken models from their first weights on."""
