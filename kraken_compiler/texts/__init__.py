"""Texts and token files as tokens of a model: to measure on, and to train on."""
