"""The outline of a model that vLLM runs, so that specs are checked against it by the same code as elsewhere."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from demur.steering.artefacts import Artefacts
from demur.vllm.offered import Known


class Outline(nn.Module):
    """Width, number of blocks and device of a model; it computes nothing."""

    def __init__(self, d_model: int, n_blocks: int, device: torch.device) -> None:
        super().__init__()
        self.d_model, self.n_blocks = d_model, n_blocks
        self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False, device=device) for _ in range(n_blocks))
        self.embedding = nn.Embedding(1, d_model, device="meta")

    def get_decoder(self) -> Any:
        """As of a transformers model."""
        return self

    def get_input_embeddings(self) -> Any:
        """As of a transformers model."""
        return self.embedding

    def artefacts(self, known: Known) -> Artefacts:
        """What specs may name, checked against this outline and moved to its device when asked for."""
        return Artefacts(cast(PreTrainedModel, self), known.saes, known.directions, {})


def outline_of(vllm_config: Any, device: torch.device) -> Outline:
    """The outline of the model that a vLLM configuration names."""
    model = vllm_config.model_config
    return Outline(int(model.get_hidden_size()), int(model.hf_text_config.num_hidden_layers), device)
