# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
LongLLaVA's hybrid decoder: Jamba's layers (arXiv 2403.19887) with a state that is a value. Any split of a sequence
into forward passes over one cache, and any padding, gives the logits of a single pass without padding.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, use_experts_implementation
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.jamba.modeling_jamba import (
    JambaAttention,
    JambaMLP,
    JambaRMSNorm,
    eager_attention_forward,
    load_balancing_loss_func,
    repeat_kv,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.import_utils import is_torchdynamo_compiling

from .cache_longllava import LongLLaVACache
from .causal_conv1d_longllava import causal_conv1d, sequence_starts
from .checkpoint_longllava import PublishedPreTrainedModel, load_split_experts, load_tied_weights
from .compat_longllava import (
    CACHE,
    FetchedAsOne,
    OutputRecorder,
    SettableExperts,
    accepts_cache,
    align_module_device,
    as_cache,
    attention_and_logsumexp_cpu,
    capture_outputs,
    is_instance,
    merge_with_config_defaults,
    recurrent_states,
    take_cache,
)
from .configuration_longllava import LongLLaVATextConfig
from .experts_longllava import choose_experts_forward, experts_reference, unpack_experts
from .generation_longllava import LongLLaVAGenerationMixin, check_no_image_tokens
from .grouped_linear_longllava import has_triton_kernels, planned_device
from .int8_longllava import LongLLaVAInt8Linear, check_int8_adapters
from .selective_scan_longllava import selective_scan


EXPERTS_IMPLEMENTATION = "longllava"
"""The name of this file's experts among Transformers' `experts_implementation`s, and the default of these models."""


class Padding(NamedTuple):
    """
    Where the padding of a forward pass lies, and how to move it out of the way of a recurrence.

    order (`(batch, length)`): puts each row's tokens first, in their order, and its padding last.
    inverse (`(batch, length)`): undoes that.
    is_token (`(batch, length)`, bool): which positions hold tokens, after `order`.
    lengths (`(batch,)`): number of tokens in each row.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    is_token: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def from_attention_mask(cls, attention_mask: torch.Tensor | None, length: int) -> "Padding | None":
        """
        Args:
            attention_mask (`torch.Tensor` of shape `(batch, past length + length)`): 0 where there is padding.
            length (`int`): number of positions of this forward pass; the mask's last ones are theirs.

        Returns:
            `Padding`, or `None` where there is none.
        """
        if attention_mask is None or attention_mask.ndim != 2:
            return None
        is_token = attention_mask[:, -length:].bool()
        # Looking at the mask makes the host wait for a device: worth it for a prompt, not for every generated token.
        may_look = not is_torchdynamo_compiling() and (length > 1 or is_token.device.type == "cpu")
        if may_look and is_token.all():
            return None
        order = torch.argsort(~is_token, dim=-1, stable=True)
        return cls(order, torch.argsort(order, dim=-1), is_token.gather(-1, order), is_token.sum(-1))


def _permute_tokens(hidden_states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return hidden_states.gather(1, order.unsqueeze(-1).expand_as(hidden_states))


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float = 0.0
) -> torch.Tensor:
    """
    Causal attention of the last positions to themselves and to all before them, without a mask in memory and without
    repeating the past's keys and values for the heads that share them.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, length, head_dim)`).
        key, value (`torch.Tensor` of shape `(batch, key_value_heads, past length + length, head_dim)`).
        scaling (`float`): what scores are multiplied with.
        dropout (`float`, defaults to 0): of the weights.

    Returns:
        `torch.Tensor` of shape `(batch, heads, length, head_dim)`.
    """
    attend = nn.functional.scaled_dot_product_attention
    (batch, heads, length, head_dim), kv_heads, past = query.shape, key.shape[1], key.shape[2] - query.shape[2]
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    if length == 1:  # sees everything, so the heads that share keys can be so many queries
        packed = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
        return attend(packed, key, value, **options).reshape(query.shape)
    kind = planned_device.get() if query.is_meta else query.device.type
    if past == 0:
        if kind == "cpu":  # where PyTorch repeats them too, unseen by those who plan memory
            key, value = (repeat_kv(x, heads // kv_heads) for x in (key, value))
        return attend(query, key, value, is_causal=True, enable_gqa=key.shape[1] < heads, **options)
    if kind != "cpu" or dropout or (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))):
        bias = None if query.is_meta else causal_lower_right(length, past + length)
        return attend(query, key, value, attn_mask=bias, enable_gqa=heads > kv_heads, **options)
    # To the past without a mask, to themselves causally; then both are weighed by the sums they were divided by.
    key, value = key.to(query.dtype), value.to(query.dtype)  # under autocast, a cache may be wider
    packed = query.reshape(batch, kv_heads, -1, head_dim)
    before, sum_before = attention_and_logsumexp_cpu(packed, key[:, :, :past], value[:, :, :past], scaling)
    key, value = (repeat_kv(x[:, :, past:], heads // kv_heads) for x in (key, value))
    now, sum_now = attention_and_logsumexp_cpu(query, key, value, scaling, is_causal=True)
    share = torch.sigmoid(sum_before.reshape(sum_now.shape) - sum_now).unsqueeze(-1).to(query.dtype)
    return torch.lerp(now, before.reshape(now.shape), share)


def packed_causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[list[int]],
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """
    As [`causal_attention`] without a past, each sequence to itself: time and memory of each alone.

    Args:
        lengths (`list[list[int]]`): how many tokens each sequence of each row has, in their order.
    """
    rows = []
    for row, row_lengths in enumerate(lengths):
        parts = zip(*(x[row : row + 1].split(row_lengths, dim=2) for x in (query, key, value)))
        rows.append(torch.cat([causal_attention(q, k, v, scaling, dropout) for q, k, v in parts], dim=2))
    return torch.cat(rows)


class LongLLaVAAttention(JambaAttention):
    """Grouped-query attention. Key difference to Llama: no positional embedding; the Mamba layers know the order."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        sequence_lengths: list[list[int]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`).
            attention_mask (`torch.Tensor`, *optional*): of whatever form the implementation of attention reads.
            cache (`Cache`, *optional*): holds the keys and values before the first token; gets those of all tokens.
            sequence_lengths (`list[list[int]]`, *optional*): see [`packed_causal_attention`]; for `sdpa`, without a cache.

        Returns:
            `torch.Tensor` of shape `(batch, length, hidden_size)`, and the weights where the implementation has them.
        """
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        # A cache of fixed size holds positions that are not used yet.
        is_growing = not getattr(cache, "is_compileable", False)
        implementation, dropout = self.config._attn_implementation, self.attention_dropout if self.training else 0.0
        if sequence_lengths is not None:
            attn_output = packed_causal_attention(query, key, value, sequence_lengths, self.scaling, dropout)
            attn_output, attn_weights = attn_output.transpose(1, 2), None
        elif attention_mask is None and is_growing and implementation == "sdpa":
            attn_output, attn_weights = causal_attention(query, key, value, self.scaling, dropout), None
            attn_output = attn_output.transpose(1, 2)
        else:
            attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
            options = {"dropout": dropout, "scaling": self.scaling, **kwargs}
            attn_output, attn_weights = attend(self, query, key, value, attention_mask, **options)
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights


class LongLLaVATimeStepProjection(nn.Linear):
    """
    A linear layer whose bias is added in float32, and whose output is float32 then: step sizes are small differences
    between the two, and bfloat16 would lose one or two percent of each.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = nn.functional.linear(hidden_states, self.weight)
        return (output if output.dtype == torch.float64 else output.float()).add_(self.bias)


class LongLLaVAMambaMixer(nn.Module):
    """
    Mamba's selective state space (arXiv 2312.00752). Key difference to Mamba: the step size, B and C are normalised,
    as in Jamba.
    """

    def __init__(self, config: LongLLaVATextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.ssm_state_size = config.mamba_d_state
        self.conv_kernel_size = config.mamba_d_conv
        self.intermediate_size = config.mamba_expand * config.hidden_size
        self.time_step_rank = int(config.mamba_dt_rank)
        self.in_proj = nn.Linear(config.hidden_size, 2 * self.intermediate_size, bias=config.mamba_proj_bias)
        self.conv1d = nn.Conv1d(
            self.intermediate_size,
            self.intermediate_size,
            kernel_size=self.conv_kernel_size,
            groups=self.intermediate_size,
            bias=config.mamba_conv_bias,
        )
        self.act = ACT2FN[config.hidden_act]
        self.x_proj = nn.Linear(self.intermediate_size, self.time_step_rank + 2 * self.ssm_state_size, bias=False)
        self.dt_proj = LongLLaVATimeStepProjection(self.time_step_rank, self.intermediate_size)
        self.A_log = nn.Parameter(torch.empty(self.intermediate_size, self.ssm_state_size))
        self.D = nn.Parameter(torch.empty(self.intermediate_size))
        self.out_proj = nn.Linear(self.intermediate_size, config.hidden_size, bias=config.mamba_proj_bias)
        self.dt_layernorm = JambaRMSNorm(self.time_step_rank, eps=config.rms_norm_eps)
        self.b_layernorm = JambaRMSNorm(self.ssm_state_size, eps=config.rms_norm_eps)
        self.c_layernorm = JambaRMSNorm(self.ssm_state_size, eps=config.rms_norm_eps)

    def _past_states(self, cache: Cache | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The last `conv_kernel_size` inputs of the convolution, and the recurrent state; none where nothing is cached."""
        if cache is None:
            return None, None
        conv_state, recurrent_state = recurrent_states(cache, self.layer_idx)
        if conv_state is not None and torch.is_grad_enabled():
            # The cache overwrites its states in place, but the backward pass needs them as they are now.
            return conv_state.clone(), recurrent_state.clone()  # type: ignore[union-attr]
        return conv_state, recurrent_state

    def _last_inputs(self, x: torch.Tensor, conv_state: torch.Tensor | None, padding: Padding | None) -> torch.Tensor:
        """The state of the convolution after `x`: its last `conv_kernel_size` inputs, up to each row's last token."""
        width = self.conv_kernel_size
        before = x.new_zeros(*x.shape[:2], width) if conv_state is None else conv_state.to(x.dtype)
        if padding is None:
            return torch.cat([before, x[..., -width:]], dim=-1)[..., -width:]
        window = padding.lengths[:, None] + torch.arange(width, device=x.device)
        return torch.cat([before, x], dim=-1).gather(-1, window[:, None].expand(-1, x.shape[1], -1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        padding: Padding | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`).
            cache (`Cache`, *optional*): holds the states before the first token; gets those after the last.
            padding (`Padding`, *optional*): positions that must leave no trace.
            seq_idx (`torch.Tensor` of shape `(batch, length)`, *optional*): number of the sequence each token is of.

        Returns:
            `torch.Tensor` of shape `(batch, length, hidden_size)`.
        """
        if padding is not None:
            hidden_states = _permute_tokens(hidden_states, padding.order)
        # (batch, intermediate_size, length); halved first, as the gradients are put together as they lie in memory
        x, gate = (half.transpose(1, 2) for half in self.in_proj(hidden_states).chunk(2, dim=-1))
        if padding is not None:
            # Selected, not multiplied: whatever padding holds must not reach the state, be it infinite.
            x = torch.where(padding.is_token[:, None], x, 0)

        # 1. Causal convolution
        conv_state, recurrent_state = self._past_states(cache)
        if cache is not None:
            new_conv_state = self._last_inputs(x, conv_state, padding)
        with align_module_device(self.conv1d):
            x = self.act(causal_conv1d(x, self.conv1d, conv_state, seq_idx))

        # 2. Step size, B and C, from the input: what makes the state space selective
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        time_step, B, C = self.x_proj(x.transpose(1, 2)).split(sizes, dim=-1)
        delta = self.dt_proj(self.dt_layernorm(time_step)).transpose(1, 2)
        B, C = self.b_layernorm(B).transpose(1, 2), self.c_layernorm(C).transpose(1, 2)
        if padding is not None:
            # softplus(-inf) = 0: padding takes no step.
            delta = torch.where(padding.is_token[:, None], delta, float("-inf"))
            x = torch.where(padding.is_token[:, None], x, 0)

        # 3. The recurrence
        scan_output, final_state = selective_scan(
            x,
            delta,
            -torch.exp(self.A_log.float()),
            B,
            C,
            D=self.D,
            z=gate,
            initial_state=recurrent_state,
            seq_idx=seq_idx,
            implementation=self.config.scan_implementation,
        )
        if cache is not None:
            cache.update_conv_state(new_conv_state, self.layer_idx)
            cache.update_recurrent_state(final_state, self.layer_idx)

        output = self.out_proj(scan_output.transpose(1, 2))
        return output if padding is None else _permute_tokens(output, padding.inverse)


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
        router_logits = nn.functional.linear(hidden_states, self.weight)
        weights, experts = nn.functional.softmax(router_logits, dim=-1, dtype=torch.float).topk(self.top_k, dim=-1)
        return router_logits, weights.to(hidden_states.dtype), experts


class StackedExperts:
    """Experts of which the weights are two parameters of three dimensions, as Transformers' functions read them."""

    def __init__(self, experts: "LongLLaVAExperts", gate_up_proj: torch.Tensor, down_proj: torch.Tensor):
        self.experts, self.gate_up_proj, self.down_proj = experts, gate_up_proj, down_proj

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)


class NamedExperts(ExpertsInterface):
    """Tells experts which implementation was asked for, as it depends on their weights whether it can be used."""

    def get_interface(self, experts_implementation: str | None, default: Callable) -> Callable:
        return partial(default, experts_implementation=experts_implementation)


@use_experts_implementation(experts_interface=NamedExperts())
class LongLLaVAExperts(FetchedAsOne, nn.Module):
    """
    All experts of a layer. Key difference to Mixtral's: their weights are two linear layers, one expert's rows below the
    other's, so that whatever handles linear layers handles experts: quantisers replace, save and dequantise them, and
    `target_modules` of LoRA finds them. They are read, not called.
    """

    def __init__(self, config: LongLLaVATextConfig):
        super().__init__()
        self.num_experts = config.num_experts
        rows = 2 * config.intermediate_size * config.num_experts
        self.gate_up_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size * config.num_experts, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.register_load_state_dict_pre_hook(load_split_experts)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        experts_implementation: str | None = None,
    ) -> torch.Tensor:
        """`(tokens, hidden_size)` to the same, given the router's choice of experts and weights, both `(tokens, top_k)`."""
        inputs = (hidden_states, top_k_index, top_k_weights)
        with (
            unpack_experts(self.gate_up_proj, self.num_experts) as gate_up,
            unpack_experts(self.down_proj, self.num_experts) as down,
        ):
            if experts_implementation == "eager":
                return experts_reference(*inputs, gate_up, down, self.act_fn)
            if torch.compiler.is_compiling() and not has_triton_kernels(hidden_states):
                # The loop asks how many tokens each expert has, which is no part of a graph.
                experts_implementation = "grouped_mm"
            # Of what is quantised or has adapters Transformers' functions know nothing.
            if experts_implementation in (None, EXPERTS_IMPLEMENTATION) or not (gate_up.is_plain and down.is_plain):
                forward = choose_experts_forward(hidden_states, gate_up, down, self.act_fn)
                return forward(*inputs, gate_up, down, self.act_fn)
            forward = ALL_EXPERTS_FUNCTIONS[experts_implementation]
            return forward(StackedExperts(self, gate_up.weight, down.weight), *inputs)  # type: ignore[arg-type]


# What makes it a name that `experts_implementation` accepts.
ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, LongLLaVAExperts.forward)


class LongLLaVASparseMoeBlock(nn.Module):
    """Which experts a token goes to, and what they make of it: `(..., hidden_size)` to the same."""

    def __init__(self, config: LongLLaVATextConfig):
        super().__init__()
        self.router = LongLLaVATopKRouter(config)
        self.experts = LongLLaVAExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.router(tokens)
        return self.experts(tokens, top_k_index, top_k_weights).view_as(hidden_states)


class LongLLaVADecoderLayer(GradientCheckpointingLayer):
    """Attention or a Mamba mixer, then a feed-forward or experts, each with its norm and residual."""

    def __init__(self, config: LongLLaVATextConfig, layer_idx: int):
        super().__init__()
        has_experts = config.layers_num_experts[layer_idx] > 1
        self.layer_type = config.layer_types[layer_idx]
        self.input_layernorm = JambaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_ff_layernorm = JambaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = LongLLaVASparseMoeBlock(config) if has_experts else JambaMLP(config)
        if self.layer_type == "full_attention":
            self.self_attn = LongLLaVAAttention(config, layer_idx)  # type: ignore[arg-type]
        else:
            self.mamba = LongLLaVAMambaMixer(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding: Padding | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        cache, residual = take_cache(kwargs), hidden_states  # type: ignore[arg-type]
        hidden_states = self.input_layernorm(hidden_states)
        if self.layer_type == "full_attention":
            hidden_states = self.self_attn(hidden_states, cache=cache, **kwargs)[0]
        else:
            hidden_states = self.mamba(hidden_states, cache=cache, padding=padding, seq_idx=seq_idx)
        hidden_states = residual + hidden_states
        return hidden_states + self.feed_forward(self.pre_ff_layernorm(hidden_states))


class LongLLaVATextPreTrainedModel(SettableExperts, PublishedPreTrainedModel):
    config: LongLLaVATextConfig
    base_model_prefix = "model"
    input_modalities = ("text",)
    # Of a checkpoint of the whole model.
    _keys_to_ignore_on_load_unexpected = [r"\b(vision_tower|multi_modal_projector|mm_projector)\."]
    supports_gradient_checkpointing = True
    _no_split_modules = ["LongLLaVADecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": LongLLaVADecoderLayer,
        "attentions": LongLLaVAAttention,
        "router_logits": OutputRecorder(LongLLaVATopKRouter, index=0),
    }

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # A recurrent state cannot be rolled back, so `generate` refuses assisted decoding.
        self._is_stateful = "linear_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())
        self.register_load_state_dict_pre_hook(load_tied_weights)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As [`~PreTrainedModel.get_correct_experts_implementation`]; the default is this package's own."""
        return super().get_correct_experts_implementation(requested_experts or EXPERTS_IMPLEMENTATION)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if is_instance(module, LongLLaVAInt8Linear):  # quantised weights are read, never drawn
            return
        super()._init_weights(module)
        std = self.config.get_text_config().initializer_range
        if isinstance(module, LongLLaVAMambaMixer):
            rates = torch.arange(1, module.ssm_state_size + 1, dtype=torch.float32)
            init.copy_(module.A_log, torch.log(rates).expand(module.intermediate_size, -1).contiguous())
            init.ones_(module.D)
            # Step sizes between 0.001 and 0.1 (arXiv 2312.00752, section 3.6), through the inverse of the softplus.
            steps = torch.exp(torch.empty(module.intermediate_size).uniform_(math.log(1e-3), math.log(1e-1)))
            init.copy_(module.dt_proj.bias, steps + torch.log(-torch.expm1(-steps)))
        elif isinstance(module, LongLLaVATopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)


def positions_in_sequences(seq_idx: torch.Tensor) -> torch.Tensor:
    """Each token's position in its sequence, from the number of that sequence; both `(batch, length)`."""
    positions = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    return positions - torch.where(sequence_starts(seq_idx), positions, 0).cummax(dim=1).values


def lengths_of_sequences(seq_idx: torch.Tensor) -> list[list[int]]:
    """How many tokens each sequence of each row has, from the number of each token's sequence `(batch, length)`."""
    lengths = []
    for starts in sequence_starts(seq_idx).cpu():
        bounds = [0, *starts.nonzero().flatten().tolist(), len(starts)]
        lengths.append([end - start for start, end in pairwise(bounds)])
    return lengths


def packed_sequences(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """
    Number of the sequence that each token is of, `(batch, length)`; `None` where each row is one. It is told by `seq_idx`
    (taken out of `kwargs`), by `cu_seq_lens_q`, or by positions that begin anew where there is no cache.

    Raises:
        ValueError: for packed sequences with padding, or of which `seq_idx` or `cu_seq_lens_q` tell with a cache.
    """
    batch, length = inputs_embeds.shape[:2]
    seq_idx, bounds = kwargs.pop("seq_idx", None), kwargs.get("cu_seq_lens_q")
    if seq_idx is None and bounds is not None:
        positions = torch.arange(length, device=bounds.device)
        seq_idx = torch.searchsorted(bounds[1:].contiguous(), positions.to(bounds.dtype), right=True)[None]
    if seq_idx is None:
        is_mask = attention_mask is None or (
            torch.is_tensor(attention_mask) and attention_mask.shape == (batch, length)
        )
        if position_ids is None or cache is not None or not is_mask or is_torchdynamo_compiling():
            return None
        position_ids = position_ids.expand(batch, -1)
        if attention_mask is None or attention_mask.all():
            return find_packed_sequence_indices(position_ids)
        # Positions that are made from a mask with padding begin at each row's first token, and nowhere after it.
        is_token = attention_mask.bool()
        order = torch.argsort(~is_token, dim=-1, stable=True)
        positions, is_token = position_ids.gather(-1, order), is_token.gather(-1, order)
        if not ((positions[:, 1:] <= positions[:, :-1]) & is_token[:, 1:]).any():
            return None
        seq_idx = position_ids
    if cache is not None or (attention_mask is not None and not attention_mask.all()):
        what = "padding" if cache is None else "a cache"
        raise ValueError(f"Packed sequences cannot be combined with {what}: give each a row of its own.")
    return seq_idx.to(inputs_embeds.device).expand(batch, -1)


def check_cache(cache: Any) -> None:
    """Raises `ValueError` for anything but a cache, such as a context."""
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"`cache` must be a `Cache`, but is a {type(cache).__name__}. A context is read by `prefill` and `generate`;"
            " a loop of your own takes a copy of its cache."
        )


class LongLLaVATextModel(LongLLaVATextPreTrainedModel):
    """The decoder without its head: token ids or embeddings to hidden states."""

    def __init__(self, config: LongLLaVATextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LongLLaVADecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.final_layernorm = JambaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def train(self, mode: bool = True):
        """As [`~nn.Module.train`]; refuses adapters that would be wrong, as this is called after they are loaded too."""
        check_int8_adapters(self)
        return super().train(mode)

    def _check_states(self, cache: Cache | None) -> None:
        layers = [] if cache is None else [i for i, t in enumerate(self.config.layer_types) if t == "linear_attention"]
        if any(i >= len(cache.layers) or not hasattr(cache.layers[i], "conv_states") for i in layers):  # type: ignore[union-attr]
            raise ValueError(
                f"The decoder has Mamba layers, for which this {type(cache).__name__} has no states: make it with the"
                " model's configuration, `DynamicCache(config=model.config)`. A prefix of keys and values, as of PEFT's"
                " prefix tuning, is none that they could begin with."
            )

    def _needs_no_mask(self, attention_mask: torch.Tensor | None, length: int, cache: Cache | None) -> bool:
        """Whether what is causal about attention is all there is to know."""
        if "full_attention" not in self.config.layer_types:
            return True
        if self.config._attn_implementation != "sdpa" or getattr(cache, "is_compileable", False):
            return False
        if attention_mask is None:
            return True
        may_look = not is_torchdynamo_compiling() and (length > 1 or attention_mask.device.type == "cpu")
        return may_look and attention_mask.ndim == 2 and bool(attention_mask.all())

    @auto_docstring
    @accepts_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        r"""
        attention_mask (`torch.Tensor` of shape `(batch_size, past length + sequence_length)`, *optional*):
            0 where there is padding, which may lie anywhere.
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Nothing here embeds a position. Where there is neither padding nor a cache, a position that does not follow the
            one before begins another sequence; those do not see each other. So do `seq_idx`, the number of the sequence
            that each token is of, and `cu_seq_lens_q`, as [`DataCollatorWithFlattening`] gives them. Packed sequences have
            neither a cache nor padding: `ValueError`.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            check_no_image_tokens(input_ids, self.config.image_token_id)  # type: ignore[arg-type]
            inputs_embeds = self.embed_tokens(input_ids)
        check_cache(cache)
        self._check_states(cache)
        length = inputs_embeds.shape[1]
        seq_idx = packed_sequences(inputs_embeds, attention_mask, position_ids, cache, kwargs)  # type: ignore[arg-type]
        if seq_idx is not None:
            use_cache, attention_mask = False, None
            position_ids = positions_in_sequences(seq_idx)
        if use_cache and cache is None:
            cache = LongLLaVACache(self.config)
        if position_ids is None:
            past_length = 0 if cache is None or all(cache.is_linear) else cache.get_seq_length()
            position_ids = (torch.arange(length, device=inputs_embeds.device) + past_length).unsqueeze(0)

        # `generate` prepares the masks itself where the cache has a fixed size.
        masks = attention_mask if isinstance(attention_mask, dict) else None
        padding = Padding.from_attention_mask(masks.get("linear_attention") if masks else attention_mask, length)
        sequence_lengths = None
        if masks is not None:
            causal_mask = masks.get("full_attention")
        elif self._needs_no_mask(attention_mask, length, cache) and (
            seq_idx is None or not is_torchdynamo_compiling()
        ):
            causal_mask = None
            if seq_idx is not None and "full_attention" in self.config.layer_types:
                sequence_lengths = lengths_of_sequences(seq_idx)
        else:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **as_cache(cache if seq_idx is None else None),
            )

        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                padding=padding,
                seq_idx=seq_idx,
                sequence_lengths=sequence_lengths,
                **as_cache(cache),  # which gradient checkpointing takes away by that name
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.final_layernorm(hidden_states), **as_cache(cache))


def language_modeling_loss(
    model: Any,
    logits: torch.Tensor,
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    The mean over all labels, or their sum by `num_items_in_batch`, of which placeholders of pictures are none.

    Args:
        model (`PreTrainedModel`): whose `loss_function` it is.
        logits (`torch.Tensor` of shape `(batch, length, vocab_size)`).
        labels (`torch.Tensor` of shape `(batch, length)`).
        shift_labels (`torch.Tensor` of shape `(batch, length)`, *optional*): of each position, the label of the next one.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): number of labels of all batches of an optimizer step.

    Raises:
        ValueError: if no label is left, which would make the loss NaN; or if `num_items_in_batch` has counted
            placeholders in other batches than this one.
    """
    config: Any = model.config
    vocab_size, image_token_id = config.get_text_config().vocab_size, config.image_token_id
    given = labels[..., 1:] if shift_labels is None else shift_labels
    if image_token_id is not None:
        labels = labels.masked_fill(labels == image_token_id, -100)
        if shift_labels is not None:
            shift_labels = shift_labels.masked_fill(shift_labels == image_token_id, -100)
    learned = labels[..., 1:] if shift_labels is None else shift_labels
    if not (labels.is_meta or torch.compiler.is_compiling()):
        num_given, num_learned = torch.stack([(x != -100).sum() for x in (given, learned)]).tolist()
        if num_items_in_batch is not None and num_given > num_learned:
            if (counted := float(num_items_in_batch)) not in (num_given, num_learned):
                raise ValueError(
                    f"Of the {num_given} labels of this batch {num_given - num_learned} are placeholders of pictures"
                    f" ({image_token_id}), which `num_items_in_batch` ({counted:.0f}) may have counted in others too: set"
                    " labels to -100 where `input_ids` are placeholders, as `LongLLaVADataCollator` does."
                )
            num_items_in_batch = num_learned
        if num_learned == 0 and not num_items_in_batch:  # of an optimizer step, other batches may have labels
            raise ValueError(
                f"There is nothing to learn in any of the samples {list(range(len(labels)))} of this batch: after the first"
                " position all `labels` are -100 or placeholders of pictures. Leave such samples out, or do not cut them"
                " before what is to be learned."
            )
    if shift_labels is not None:
        kwargs["shift_labels"] = shift_labels
    return model.loss_function(
        logits=logits, labels=labels, vocab_size=vocab_size, num_items_in_batch=num_items_in_batch, **kwargs
    )


def language_modeling_outputs(
    model: Any,
    outputs: Any,
    logits_to_keep: int | torch.Tensor,
    labels: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> dict[str, Any]:
    """
    What a head makes of a decoder's outputs. The loss includes the load-balancing loss over all expert layers (arXiv
    2101.03961, equations 4 to 6), where there are router logits.

    Args:
        model (`PreTrainedModel`): with an `lm_head`.
        outputs (`ModelOutput`): of the decoder.
        logits_to_keep (`int` or `torch.Tensor`): how many of the last positions, or which; 0 for all.
        labels, attention_mask, kwargs: as for the model's `forward`.
    """
    config: Any = model.config.get_text_config()
    positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = model.lm_head(outputs.last_hidden_state[:, positions, :])
    loss: Any = None
    aux_loss: Any = None
    if labels is not None:
        loss = language_modeling_loss(model, logits, labels, **kwargs)
    if router_logits := outputs.router_logits:
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        if mask is not None:  # which covers the past too, the logits only this pass
            mask = mask[:, -(router_logits[0].shape[0] // mask.shape[0]) :]
        aux_loss = load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, mask)
        loss = None if loss is None else loss + config.router_aux_loss_coef * aux_loss.to(loss.device)
    names = ("hidden_states", "attentions", "router_logits", CACHE)
    return {"loss": loss, "aux_loss": aux_loss, "logits": logits, **{name: getattr(outputs, name) for name in names}}


class LongLLaVAForCausalLM(LongLLaVAGenerationMixin, LongLLaVATextPreTrainedModel):
    """The decoder with its head, for text alone. Loads Jamba checkpoints too."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LongLLaVATextConfig):
        super().__init__(config)
        self.model = LongLLaVATextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @auto_docstring
    @accepts_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        r"""
        output_router_logits (`bool`, *optional*):
            Whether the routers' logits are returned, and the load-balancing loss added to the loss.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if use_cache is None and (self.training or labels is not None):
            use_cache = False  # nothing goes on from here
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        return MoeCausalLMOutputWithPast(
            **language_modeling_outputs(self, outputs, logits_to_keep, labels, attention_mask, **kwargs)
        )


# `Trainer` shifts the labels that it smooths for classes that are named here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[LongLLaVATextConfig.model_type] = LongLLaVAForCausalLM.__name__


__all__ = ["LongLLaVAForCausalLM", "LongLLaVATextModel", "LongLLaVATextPreTrainedModel"]
