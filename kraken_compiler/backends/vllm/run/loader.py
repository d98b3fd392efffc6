"""How vLLM loads a compiled model: this rank's files, after their hashes have been checked."""

from __future__ import annotations

from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from kraken_compiler.backends.vllm.run.engine_config import LOAD_FORMAT


def register_loader() -> None:
    """Make the loader known, under the load format that `EngineConfig` sets."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as known

    if LOAD_FORMAT not in known:
        register_model_loader(LOAD_FORMAT)(LaneLoader)


class LaneLoader(BaseModelLoader):  # type: ignore[misc]
    """Lets the model take its weights out of the artifact."""

    def download_model(self, model_config: ModelConfig) -> None:
        """There is nothing to download."""

    def load_weights(self, model: object, model_config: ModelConfig) -> None:
        """See `BaseModelLoader`."""
        from kraken_compiler.backends.vllm.run.model import KrakenForCausalLM

        assert isinstance(model, KrakenForCausalLM)
        model.load_lane()
