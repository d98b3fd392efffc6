"""Rewrites standard Transformers into Kraken form for multi-device inference."""
