# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""The feed-forward half of a decoder layer: one dense MLP, or a router and its experts (arXiv 2403.19887, section 2)."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .configuration_longllava import LongLLaVATextConfig


class LongLLaVAMLP(nn.Module):
    """`(..., hidden_size)` to the same: `down(act(gate(x)) * up(x))`."""

    def __init__(self, config: LongLLaVATextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class LongLLaVATopKRouter(nn.Module):
    """
    Sends each token to `num_experts_per_tok` experts. The weights are those of a softmax over all experts; key
    difference to Mixtral: they are not renormalised over the chosen ones.
    """

    def __init__(self, config: LongLLaVATextConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(tokens, hidden_size)`).

        Returns:
            router logits `(tokens, num_experts)`, chosen weights and chosen experts, both `(tokens, top_k)`.
        """
        router_logits = F.linear(hidden_states, self.weight)
        weights, experts = F.softmax(router_logits, dim=-1, dtype=torch.float).topk(self.top_k, dim=-1)
        return router_logits, weights.to(hidden_states.dtype), experts


@use_experts_implementation
class LongLLaVAExperts(nn.Module):
    """
    All experts of a layer, their weights stacked. `forward` here is the readable reference; Transformers dispatches to
    `config._experts_implementation` (`eager`, `batched_mm`, `grouped_mm`) with the same arguments.
    """

    def __init__(self, config: LongLLaVATextConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(
            torch.empty(config.num_experts, 2 * config.intermediate_size, config.hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.intermediate_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`(tokens, hidden_size)` to the same, given the router's choice of experts and weights, both `(tokens, top_k)`."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, choice = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, expert_output * top_k_weights[token, choice, None].to(expert_output.dtype))
        return output


class LongLLaVASparseMoeBlock(nn.Module):
    """A router and its experts, in place of the dense MLP."""

    def __init__(self, config: LongLLaVATextConfig):
        super().__init__()
        self.router = LongLLaVATopKRouter(config)
        self.experts = LongLLaVAExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.router(tokens)
        return self.experts(tokens, top_k_index, top_k_weights).view_as(hidden_states)


__all__ = ["LongLLaVAExperts", "LongLLaVAMLP", "LongLLaVASparseMoeBlock", "LongLLaVATopKRouter"]
