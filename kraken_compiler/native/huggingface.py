"""A Kraken model with the face of transformers: `save_pretrained`, `generate`, `Trainer`. Needs the extra `hf`.

    model = KrakenForCausalLM(KrakenHubConfig(layers=2, width=64, heads=4, degree=2, vocab_size=512))
    Trainer(model=model, ...).train()
    model.save_pretrained("native")          # a directory that kraken-compile takes

`generate` reads the whole text again for every token; ranks of the compiled model keep a KV cache.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from kraken_compiler.errors import UsageError
from kraken_compiler.native.config import KrakenConfig
from kraken_compiler.native.directory import MODEL_TYPE
from kraken_compiler.native.model import KrakenLM

_HUB_NAMES = {"vocabulary": "vocab_size", "context": "max_position_embeddings"}
"""What transformers reads under names of its own."""


class KrakenHubConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The sizes and kinds of a Kraken model (`KrakenConfig`), under transformers' names where it reads them itself."""

    model_type = MODEL_TYPE
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "layers",
        "hidden_size": "width",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
    }

    def __init__(self, **values: Any) -> None:
        default = KrakenConfig()
        for field in fields(KrakenConfig):
            name = _HUB_NAMES.get(field.name, field.name)
            given = values.pop(field.name, None)
            setattr(self, name, values.pop(name, getattr(default, field.name) if given is None else given))
        values.setdefault("tie_word_embeddings", True)
        values.setdefault("use_cache", False)
        super().__init__(**values)

    def kraken(self) -> KrakenConfig:
        """The config of the model itself.

        Raises:
            UsageError: It describes no model.
        """
        return KrakenConfig(
            **{field.name: getattr(self, _HUB_NAMES.get(field.name, field.name)) for field in fields(KrakenConfig)}
        )


class KrakenForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A Kraken model behind transformers' interface.

    Attributes:
        model: The model itself.
    """

    config_class = KrakenHubConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: KrakenHubConfig) -> None:
        super().__init__(config)
        self.model = KrakenLM(config.kraken())
        self.post_init()  # type: ignore[no-untyped-call]
        # There is no cache of transformers' kind.
        self.generation_config.use_cache = False

    def _init_weights(self, module: Any) -> None:
        """Leave the weights as `KrakenLM` has made them."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Logits, and with `labels` the loss.

        Args:
            input_ids: int64 [B, T]; rows that are shorter are padded on the right.
            attention_mask: [B, T], 0 where a row is padded. No token sees what is on its right.
            labels: As `input_ids`, with -100 where nothing is to be predicted.
            num_items_in_batch: How many tokens the loss is the mean of, where they are those of several batches, as
                `Trainer` asks when it accumulates gradients; None means those of this one.

        Raises:
            UsageError: A row is padded on the left.
        """
        if attention_mask is not None and not bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
            raise UsageError("a row is padded on the left, where every token sees it; pad rows on the right")
        logits = self.model(input_ids)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor]:
        if attention_mask is not None and not bool(attention_mask.all()):
            raise UsageError("generate continues rows of one length; give rows of other lengths one by one")
        return {"input_ids": input_ids}

    def get_input_embeddings(self) -> Any:
        return self.model.embedding


AutoConfig.register(MODEL_TYPE, KrakenHubConfig)
AutoModelForCausalLM.register(KrakenHubConfig, KrakenForCausalLM)
