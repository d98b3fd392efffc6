"""The entry point that every process of vLLM calls: makes models of this package known to it.

It may be called any number of times. The model's class is named, not imported: vLLM imports it in the processes that
need it.
"""

from __future__ import annotations

from kraken_compiler.backends.vllm.format import ARCHITECTURE, MODEL_TYPE


def register() -> None:
    """Register the model class, its config's class, and how its weights are loaded."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from kraken_compiler.backends.vllm.run.engine_config import EngineConfig, KrakenConfig
    from kraken_compiler.backends.vllm.run.loader import register_loader

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "kraken_compiler.backends.vllm.run.model:KrakenForCausalLM")
    AutoConfig.register(MODEL_TYPE, KrakenConfig, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = EngineConfig
    register_loader()
