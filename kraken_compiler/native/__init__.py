"""Kraken models as the paper has them: narrow parallel streams of their own, trained from scratch."""

from kraken_compiler.native.config import PRESETS, KrakenConfig
from kraken_compiler.native.model import KrakenLM

__all__ = ["PRESETS", "KrakenConfig", "KrakenLM"]
