"""What vLLM is told of an artifact before it loads it, and what it must not be asked for.

vLLM calls `EngineConfig` when it puts its configuration together, in the process that the user started. So what cannot
be done is refused before any worker starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PretrainedConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from kraken_compiler.artifact.read import Artifact, open_artifact
from kraken_compiler.backends.lane_graph.run_graph import KEEP_THE_ORDER
from kraken_compiler.backends.vllm.format import MODEL_TYPE, RECORD_FILE
from kraken_compiler.backends.vllm.run.options import OPTIONS_KEY, EngineOptions
from kraken_compiler.backends.vllm.run.shared_host import share_host
from kraken_compiler.errors import KrakenError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

LOAD_FORMAT = "kraken"


class KrakenConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The config of a compiled model; `config.json` at an artifact's root."""

    model_type = MODEL_TYPE


class EngineConfig(VerifyAndUpdateConfig):  # type: ignore[misc]
    """vLLM's configuration for a compiled model."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Compute in the artifact's type: its graphs say where they round, and were checked so."""
        import torch

        artifact = _artifact(model_config)
        assert artifact.manifest.cache is not None, "only programs with a KV cache are written"
        model_config.dtype = getattr(torch, artifact.manifest.cache.plan.caches[0].dtype)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what cannot be done, and set what must be so.

        Raises:
            ValueError: In one line: what was asked for, and why not.
        """
        artifact = _artifact(vllm_config.model_config)
        _require_possible(artifact, vllm_config)
        share_host(vllm_config)
        EngineOptions.of(vllm_config)
        vllm_config.load_config.load_format = LOAD_FORMAT
        # What vLLM compiled is kept by its configuration: an artifact of another content must not find it, nor ranks on
        # one host what ranks of several have compiled, whose sums are other calls.
        vllm_config.additional_config = {
            **vllm_config.additional_config,
            OPTIONS_KEY + "_artifact": artifact.fingerprint(),
            OPTIONS_KEY + "_ranks_of_a_host": vllm_config.parallel_config.local_world_size,
        }
        compilation = vllm_config.compilation_config
        compilation.inductor_compile_config = {**KEEP_THE_ORDER, **compilation.inductor_compile_config}
        if compilation.splitting_ops is None:
            # By default graphs are cut at attentions, which lie between starts and waits.
            compilation.splitting_ops = []


def _artifact(model_config: ModelConfig) -> Artifact:
    try:
        return open_artifact(Path(model_config.model), verify=False)
    except KrakenError as error:
        raise ValueError(str(error)) from error


def _require_possible(artifact: Artifact, vllm_config: VllmConfig) -> None:
    parallel, model, degree = vllm_config.parallel_config, vllm_config.model_config, artifact.manifest.degree
    if RECORD_FILE not in artifact.manifest.files:
        raise ValueError(f"{artifact.directory} was compiled without the vllm backend; compile it with --backend vllm")
    if parallel.tensor_parallel_size != degree:
        raise ValueError(
            f"{artifact.directory} has {degree} lanes: run it with --tensor-parallel-size {degree}, "
            f"not {parallel.tensor_parallel_size}, or compile it for that degree"
        )
    refusals = {
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--enable-lora": vllm_config.lora_config is not None,
        "--quantization": model.quantization is not None,
        "--enable-expert-parallel": parallel.enable_expert_parallel,
        "--enable-prompt-embeds": model.enable_prompt_embeds,
        "--load-format": vllm_config.load_config.load_format not in ("auto", LOAD_FORMAT),
    }
    refused = next((option for option, is_asked in refusals.items() if is_asked), None)
    if refused is not None:
        raise ValueError(f"{artifact.directory}: a compiled model does not take {refused}; leave it out")
