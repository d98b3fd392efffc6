"""Model to graph: Hugging Face directories, GGUF files, torch.export archives, pickled modules, live modules."""

from kraken_compiler.capture.capture_model import Model, capture
from kraken_compiler.capture.captured_model import Capture, Origin, TokenizerSource

__all__ = ["Capture", "Model", "Origin", "TokenizerSource", "capture"]
