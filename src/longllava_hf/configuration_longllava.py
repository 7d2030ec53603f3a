# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
LongLLaVA configurations, the decoders that are supported, and the translation from the flat `llava_jamba` configuration
its authors published.
"""

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What says where files come from, among the arguments of `from_pretrained`.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

SUPPORTED_DECODERS = ("longllava_text", "qwen2", "qwen3", "llama", "mistral")
"""Model types that a LongLLaVA's decoder may have: those that contexts, chunks and packed samples are tested with."""

LAYER_TYPES = ("full_attention", "linear_attention")
"""Kinds of layers that a decoder may have; `"linear_attention"` is Mamba."""

DEFAULT_VISION_TOWER = "openai/clip-vit-large-patch14-336"

# `openai/clip-vit-large-patch14-336`, written out so that reading a published configuration needs no network.
_DEFAULT_VISION_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}

# A published configuration's keys, by what they are called here, and the values of those that have a few. The authors
# have no image token id, and set `resamplePooling` by hand: where it is missing it is 2d, an explicit null means none.
_PUBLISHED_KEYS = {
    "vision_feature_layer": "mm_vision_select_layer",
    "vision_feature_select_strategy": "mm_vision_select_feature",
    "projector_type": "mm_projector_type",
    "pooling_mode": "resamplePooling",
    "image_token_id": "image_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
}
_PUBLISHED_VALUES: dict[str, dict[str | None, str]] = {
    "mm_vision_select_feature": {"patch": "default", "cls_patch": "full"},
    "mm_projector_type": {"mlp2x_gelu": "mlp2x_gelu", "linear": "linear"},
    "resamplePooling": {"2d": "2d", "1d": "1d", "none": "none", None: "none"},
    "mm_patch_merge_type": {"flat": "flat"},
}
# Keys of a published configuration that speak of the picture side, or of a Transformers release long gone.
_PUBLISHED_ONLY_KEYS = {
    "image_token_id", "image_aspect_ratio", "resamplePooling", "use_mamba_kernels", "calc_logits_for_entire_prompt",
    "mamba_inner_layernorms", "n_ctx", "sliding_window", "tokenizer_model_max_length", "tokenizer_padding_side",
    "transformers_version", "use_mm_proj", "freeze_mm_mlp_adapter", "tune_mm_mlp_adapter", "architectures", "auto_map",
    "model_type", "name_or_path", "_name_or_path",
}  # fmt: skip
# Keys that `from_dict` adds to a configuration on behalf of the caller; they stay at the top.
_CALLER_KEYS = ("attn_implementation", "experts_implementation", "output_attentions", "num_labels")


# What the configuration of a whole model says of its decoder too.
_SHARED_KEYS = ("dtype", "image_token_id", "quantization_config", "tie_word_embeddings")

# More of them than any model has take minutes to be listed, let alone built.
_MAX_LAYERS = 1024


@contextmanager
def named_errors(what: str, source: Any) -> Iterator[None]:
    """
    A `ValueError`, or an `OSError` where it is one, that says what of which file cannot be used, in place of whatever
    those who read it raise. A source of `None` changes nothing.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, ImportError):
        raise
    except BaseException as error:  # the tokenizers' panics are no `Exception`
        is_plain = isinstance(error, (OSError, ValueError))
        if source is None or (is_plain and str(source) in str(error)):
            raise
        reason = f"{error}" if is_plain else f"{type(error).__name__}: {error}"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{what} of `{source}` cannot be used: {reason}") from error


def _check_sizes(config: Any, names: str, most: int | None = None) -> None:
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not 1 <= value <= (most or value):
            raise ValueError(f"`{name}` must be at least 1{f' and at most {most}' if most else ''}, but is {value}.")


@strict
class LongLLaVATextConfig(PreTrainedConfig):
    r"""
    Configuration of the hybrid decoder: Jamba's (arXiv 2403.19887), as LongLLaVA (arXiv 2409.02889, section 3.1) uses
    it. One layer in `attn_layer_period` is attention without positional embedding, the rest are Mamba; one layer in
    `expert_layer_period` has `num_experts` experts, the rest one dense MLP.

    Args:
        num_experts (`int`, defaults to 16):
            Experts of an expert layer; 1 makes every layer dense (LongLLaVA-9B).
        num_experts_per_tok (`int`, defaults to 2):
            Experts a token is sent to. Their weights come from a softmax over all experts and are not renormalised.
        attn_layer_period, attn_layer_offset (`int`, default to 8 and 4):
            Layer `i` is attention where `i % attn_layer_period == attn_layer_offset`.
        layer_types (`list[str]`, *optional*):
            `"full_attention"` or `"linear_attention"` (Mamba) for each layer, instead of period and offset; by default
            what these two say. Transformers' caches are built from it. Only a list that period and offset do not give is
            saved, so that the number of layers can be changed in a saved configuration.
        expert_layer_period, expert_layer_offset (`int`, default to 2 and 1):
            Layer `i` has experts where `i % expert_layer_period == expert_layer_offset`.
        mamba_d_state (`int`, defaults to 16):
            Size of the recurrent state of one channel.
        mamba_d_conv (`int`, defaults to 4):
            Width of the causal convolution.
        mamba_expand (`int`, defaults to 2):
            Channels of a Mamba layer, in units of `hidden_size`.
        mamba_dt_rank (`int` or `"auto"`, defaults to `"auto"`):
            Rank of the step-size projection; `"auto"` is `ceil(hidden_size / 16)`.
        mamba_conv_bias, mamba_proj_bias (`bool`, default to `True` and `False`):
            Whether the convolution, and the input and output projections, have a bias.
        output_router_logits (`bool`, defaults to `False`):
            Return the routers' logits, and add the load-balancing loss times `router_aux_loss_coef` to the loss.
        image_token_id (`int`, *optional*):
            Of the whole model that the decoder was taken from: as it has no vision tower, that id is refused.
        scan_implementation (`str`, *optional*):
            What computes the Mamba layers' recurrence: `"torch"`, `"triton"`, `"mamba_ssm"` or `"reference"`; by default
            the fastest that is there.

    The other arguments are those of every decoder in Transformers.
    """

    model_type = "longllava_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "router_logits", "aux_loss"]
    attribute_map = {"num_local_experts": "num_experts"}
    # Mamba layers and experts stay whole on each device: of the former's `in_proj` and the latter's `gate_up_proj` a device's
    # share would not be one piece. The embedding is cut as a head that is tied to it: newer releases do so by themselves.
    base_model_tp_plan = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.feed_forward.gate_proj": "colwise",
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
    }

    vocab_size: int = 65536
    tie_word_embeddings: bool = False
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    max_position_embeddings: int = 262144
    attention_dropout: float | int = 0.0
    num_experts_per_tok: int = 2
    num_experts: int = 16
    expert_layer_period: int = 2
    expert_layer_offset: int = 1
    attn_layer_period: int = 8
    attn_layer_offset: int = 4
    layer_types: list[str] | Any = None  # a list once it is filled, whatever was given
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_dt_rank: int | str = "auto"
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    image_token_id: int | None = None
    scan_implementation: str | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """
        As [`~PreTrainedConfig.get_config_dict`]; of a whole model, what is said of its decoder.

        Raises:
            ValueError: if that has another decoder.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        whole, text_config = config_dict, config_dict.get(cls.base_config_key)
        if isinstance(text_config, dict):
            found = text_config.get("model_type", cls.model_type)
            if found != cls.model_type:
                raise ValueError(
                    f"The decoder of `{pretrained_model_name_or_path}` is a `{found}` and no `{cls.model_type}`: load the"
                    " whole model, and take its `language_model`."
                )
            shared = {name: whole[name] for name in _SHARED_KEYS if whole.get(name) is not None}
            config_dict = {**text_config, **shared}
        elif whole.get("model_type") == LlavaJambaConfig.model_type:
            config_dict = {"image_token_id": LongLLaVAConfig.image_token_id, **whole}
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As [`~PreTrainedConfig.from_dict`]; a Jamba configuration becomes one of this type."""
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            config_dict = {key: value for key, value in config_dict.items() if key != "model_type"}
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.mamba_dt_rank == "auto":
            self.mamba_dt_rank = math.ceil(self.hidden_size / 16)
        if self.num_experts == 1:  # nothing to balance; TRL goes by it
            self.router_aux_loss_coef = 0.0
        super().__post_init__(**kwargs)
        if self.layer_types is None:
            self.validate_architecture()  # period and offset are about to be used
            self.layer_types = self._periodic_layer_types()

    def __setattr__(self, name, value):
        # Layer types that period and offset give keep following them, and the number of layers.
        follow = name in ("num_hidden_layers", "attn_layer_period", "attn_layer_offset") and self._is_periodic()
        super().__setattr__(name, value)
        if follow:
            self.layer_types = self._periodic_layer_types()

    def _periodic_layer_types(self) -> list[str]:
        return [
            "full_attention" if i % self.attn_layer_period == self.attn_layer_offset else "linear_attention"
            for i in range(self.num_hidden_layers)
        ]

    def _is_periodic(self) -> bool:
        """Whether the layer types are what period and offset give; not while they are still to be filled."""
        return self.layer_types is not None and self.layer_types == self._periodic_layer_types()

    def to_dict(self) -> dict[str, Any]:
        """As [`~PreTrainedConfig.to_dict`], without layer types that period and offset give."""
        output = super().to_dict()
        if self._is_periodic():
            del output["layer_types"]
        if self.image_token_id is None:
            del output["image_token_id"]
        return output

    @property
    def layers_block_type(self) -> list[str]:
        """The layer types under Jamba's names, `"attention"` and `"mamba"`."""
        self.validate_layer_type()
        return ["attention" if kind == "full_attention" else "mamba" for kind in self.layer_types]

    @property
    def layers_num_experts(self) -> list[int]:
        """Number of experts of each layer; 1 is a dense MLP. Raises `ValueError` where `layer_types` are of another number."""
        self.validate_layer_type()
        return [
            self.num_experts if i % self.expert_layer_period == self.expert_layer_offset else 1
            for i in range(self.num_hidden_layers)
        ]

    def validate_architecture(self):
        """Part of the validation that `@strict` runs on every new configuration."""
        _check_sizes(self, "num_hidden_layers num_experts", _MAX_LAYERS)
        _check_sizes(self, "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads")
        _check_sizes(self, "num_experts_per_tok mamba_d_state mamba_d_conv mamba_expand mamba_dt_rank")
        _check_sizes(self, "attn_layer_period expert_layer_period")
        if not 0 < self.rms_norm_eps < math.inf:
            raise ValueError(f"`rms_norm_eps` must be positive, but is {self.rms_norm_eps}.")
        for kind in ("attn", "expert"):
            period, offset = getattr(self, f"{kind}_layer_period"), getattr(self, f"{kind}_layer_offset")
            if not 0 <= offset < period:
                raise ValueError(
                    f"`{kind}_layer_offset` ({offset}) must be smaller than its period ({period}), and not negative."
                )
        if self.num_experts_per_tok > self.num_experts > 1:
            raise ValueError(
                f"`num_experts_per_tok` ({self.num_experts_per_tok}) must not exceed `num_experts` ({self.num_experts})."
            )

    def validate_layer_type(self):
        """Part of the validation too: one of [`LAYER_TYPES`] for each layer."""
        super().validate_layer_type()
        if unknown := sorted(set(self.layer_types or ()) - set(LAYER_TYPES)):
            raise ValueError(f"Each of `layer_types` must be one of {list(LAYER_TYPES)}, but there are {unknown}.")


@strict
class LongLLaVAConfig(PreTrainedConfig):
    r"""
    Configuration of LongLLaVA: a vision tower, a pooling, a projector and a decoder.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            The tower's; defaults to CLIP ViT-L/14 at 336 pixels.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            The decoder's, of one of the model types in `SUPPORTED_DECODERS`, without sliding windows; defaults to
            [`LongLLaVATextConfig`].
        image_token_id (`int`, defaults to 516):
            The id that stands for one image token. 516 is the first reserved piece of Jamba's vocabulary, so that
            pretrained embeddings need no resizing; an id outside the vocabulary works too, as it is never embedded.
        vision_feature_layer (`int`, defaults to -2):
            Hidden state of the tower that is used.
        vision_feature_select_strategy (`"default"` or `"full"`, defaults to `"default"`):
            `"default"` drops the class token.
        pooling_mode (`"2d"`, `"1d"` or `"none"`, defaults to `"2d"`):
            How the tower's patches become a quarter as many tokens: a bilinear halving of both sides of the patch
            map, a linear resize of the sequence, or not at all (arXiv 2409.02889, section 3.1).
        pooling_order (`"before_projector"` or `"after_projector"`, defaults to `"before_projector"`):
            LongLLaVA pools before the projector, LongVA after it.
        projector_type (`"mlp2x_gelu"` or `"linear"`, defaults to `"mlp2x_gelu"`):
            Two linear layers with an activation between them, or one.
        projector_hidden_act (`str`, defaults to `"gelu"`):
            That activation.
        patch_strategy (`"none"` or `"best_fit"`, defaults to `"none"`):
            Whether a large picture is also cut into sub-images; the processor's default.
        image_grid_pinpoints (`list[list[int]]`, *optional*):
            The `(rows, columns)` of sub-images that `"best_fit"` chooses from; the processor's default.
        vision_batch_size (`int`, defaults to 64):
            Pictures that the tower sees at a time, however many there are: its activations are large, and more at once
            are no faster.
        vision_tower (`str`, *optional*):
            Folder or Hub id the tower's weights come from where a checkpoint has none of its own.

    Raises:
        ValueError: for a decoder that is not supported.
    """

    model_type = "longllava"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    keys_to_ignore_at_inference = [
        "cache", "past_key_values", "router_logits", "aux_loss", "image_hidden_states", "image_outputs",
    ]  # fmt: skip

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 516
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    pooling_mode: Literal["2d", "1d", "none"] = "2d"
    pooling_order: Literal["before_projector", "after_projector"] = "before_projector"
    projector_type: Literal["mlp2x_gelu", "linear"] = "mlp2x_gelu"
    projector_hidden_act: str = "gelu"
    patch_strategy: Literal["none", "best_fit"] = "none"
    image_grid_pinpoints: list | None = None
    vision_batch_size: int = 64
    vision_tower: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if not isinstance(self.vision_config, PreTrainedConfig):
            vision_config = _DEFAULT_VISION_CONFIG if self.vision_config is None else self.vision_config
            self.vision_config = AutoConfig.for_model(**{"model_type": "clip_vision_model", **vision_config})
        if not isinstance(self.text_config, PreTrainedConfig):
            text_config = {"model_type": LongLLaVATextConfig.model_type, **(self.text_config or {})}
            # Without the Auto classes, which know nothing of it where the code comes with the checkpoint.
            is_own = text_config["model_type"] == LongLLaVATextConfig.model_type
            if is_own:
                text_config["image_token_id"] = self.image_token_id
            self.text_config = (LongLLaVATextConfig if is_own else AutoConfig.for_model)(**text_config)
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        self.validate_decoder()  # here too, as what the validation after this raises is no `ValueError`
        super().__post_init__(**kwargs)

    @property
    def image_seq_length(self) -> int:
        """Tokens of one picture of the tower's size: 144 for LongLLaVA (24 x 24 patches, halved both ways)."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        if self.pooling_mode == "2d":
            return (side // 2) ** 2
        patches = side * side + (self.vision_feature_select_strategy == "full")
        return patches // 4 if self.pooling_mode == "1d" else patches

    def validate_architecture(self):
        """Part of the validation that `@strict` runs on every new configuration."""
        if self.pooling_mode == "2d" and self.vision_feature_select_strategy == "full":
            raise ValueError('`pooling_mode="2d"` needs `vision_feature_select_strategy="default"`: no class token.')
        if self.vision_batch_size < 1:
            raise ValueError(f"`vision_batch_size` must be at least 1, but is {self.vision_batch_size}.")
        if not 0 <= self.image_token_id < 2**31:
            raise ValueError(f"`image_token_id` must be from 0 to 2^31 - 1, but is {self.image_token_id}.")
        tower = self.vision_config
        _check_sizes(tower, "num_hidden_layers", _MAX_LAYERS)
        _check_sizes(tower, "hidden_size image_size patch_size")
        if not -tower.num_hidden_layers - 1 <= self.vision_feature_layer <= tower.num_hidden_layers:
            raise ValueError(
                f"`vision_feature_layer` must be one of the tower's {tower.num_hidden_layers} layers or their input, but is"
                f" {self.vision_feature_layer}."
            )
        if self.image_seq_length < 1:
            raise ValueError(
                f"A picture of {tower.image_size} pixels in patches of {tower.patch_size} has no token after pooling"
                f" (`pooling_mode={self.pooling_mode!r}`)."
            )

    def validate_decoder(self):
        """Part of the validation too: a decoder that is tested, every attention layer of which sees all tokens."""
        decoder = self.text_config
        name = f"The decoder's model type `{decoder.model_type}`"
        if decoder.model_type not in SUPPORTED_DECODERS:
            raise ValueError(f"{name} is not supported: it must be one of {list(SUPPORTED_DECODERS)}.")
        # Qwen2 and Qwen3 have a window only with `use_sliding_window`.
        switch, window = getattr(decoder, "use_sliding_window", None), getattr(decoder, "sliding_window", None)
        if switch or window is not None:
            found, wanted = ("use_sliding_window=True", "False") if switch else (f"sliding_window={window}", "None")
            raise ValueError(
                f"{name} is supported without sliding-window attention, but `text_config` has `{found}`: set"
                f" `{found.split('=')[0]}={wanted}`."
            )
        if unknown := sorted(set(getattr(decoder, "layer_types", None) or ()) - set(LAYER_TYPES)):
            raise ValueError(
                f"{name} is supported with the `layer_types` {list(LAYER_TYPES)}, but {unknown} are among those of"
                " `text_config`: set `layer_types` to these."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As [`~PreTrainedConfig.from_dict`]; a published flat configuration (`model_type: llava_jamba`) is translated."""
        # Only where the tower is looked for, and in errors: what is read from a folder does not depend on its name.
        folder = kwargs.pop("name_or_path", None)
        with named_errors("The configuration", folder):
            if config_dict.get("model_type") == LlavaJambaConfig.model_type:
                stored = config_dict.get("_name_or_path") or config_dict.get("name_or_path")
                config_dict = published_to_native(config_dict, folder=folder or stored)
            return super(LongLLaVAConfig, LongLLaVAConfig).from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As [`~PreTrainedConfig.from_pretrained`]; accepts published checkpoints too."""
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        with named_errors("The configuration", pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)


class LlavaJambaConfig(LongLLaVAConfig):
    """Of the authors' checkpoints. Never instantiated: reading one gives a [`LongLLaVAConfig`]."""

    model_type = "llava_jamba"


def has_own_decoder(config: PreTrainedConfig) -> bool:
    """Whether a model's decoder is LongLLaVA's own, and not another one that Transformers knows."""
    return config.get_text_config().model_type == LongLLaVATextConfig.model_type


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say where files come from."""
    return {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}


def locate_vision_tower(name: str | None, folder: str | os.PathLike | None) -> str:
    """
    Where the tower that a checkpoint calls `name` is to be found: an existing folder (with an absolute path, or relative
    to the checkpoint, or else to its parent; never to the working directory), or a Hub id.

    A path that does not exist, such as one of the authors' machine, falls back to [`DEFAULT_VISION_TOWER`] with a
    warning that names both.
    """
    if name is None:
        return DEFAULT_VISION_TOWER
    roots = [] if folder is None else [str(folder), os.path.dirname(os.path.abspath(str(folder)))]
    roots = [""] if os.path.isabs(name) else roots
    for root in roots:
        candidate = os.path.normpath(os.path.join(root, name))
        if os.path.isdir(candidate):
            return candidate
    is_hub_id = name.count("/") <= 1 and not name.startswith((".", "/", "~")) and "\\" not in name
    if is_hub_id:
        return name
    logger.warning(
        f"The vision tower `{name}` of the checkpoint does not exist here; using `{DEFAULT_VISION_TOWER}` instead."
    )
    return DEFAULT_VISION_TOWER


def published_to_native(config_dict: dict[str, Any], folder: str | os.PathLike | None = None) -> dict[str, Any]:
    """
    Translate the flat configuration of a published checkpoint.

    Args:
        config_dict (`dict`): the content of its `config.json`; left as it is.
        folder (`str`, *optional*): where that file lies, so that a relative `mm_vision_tower` can be found.

    Returns:
        `dict`: arguments of [`LongLLaVAConfig`].

    Raises:
        ValueError: for a projector, feature, pooling or merge type that LongLLaVA does not have.
    """
    flat = copy.deepcopy(config_dict)
    for key, values in _PUBLISHED_VALUES.items():
        if key in flat and flat[key] not in list(values):
            raise ValueError(f"`{key}` must be one of {list(values)}, but config.json has {flat[key]!r}.")
    tower = locate_vision_tower(flat.get("mm_vision_tower"), folder)
    vision_config = dict(_DEFAULT_VISION_CONFIG)
    if tower != DEFAULT_VISION_TOWER:
        stored = AutoConfig.from_pretrained(tower, trust_remote_code=False)
        vision_config = getattr(stored, "vision_config", stored).to_dict()
    # A folder is remembered as the checkpoint calls it; once the weights are in one place it is not looked up again.
    remembered = flat["mm_vision_tower"] if os.path.isdir(tower) else tower

    text_config = {
        key: value
        for key, value in flat.items()
        if key not in _PUBLISHED_ONLY_KEYS and key not in _CALLER_KEYS and not key.startswith("mm_")
    }
    if "n_ctx" in flat:
        text_config.setdefault("max_position_embeddings", flat["n_ctx"])
    native = {
        "model_type": LongLLaVAConfig.model_type,
        "architectures": ["LongLLaVAForConditionalGeneration"],
        "text_config": text_config,
        "vision_config": vision_config,
        "vision_tower": remembered,
    }
    for name, key in _PUBLISHED_KEYS.items():
        if key in flat:
            native[name] = _PUBLISHED_VALUES[key][flat[key]] if key in _PUBLISHED_VALUES else flat[key]
    if (dtype := text_config.pop("torch_dtype", text_config.pop("dtype", None))) is not None:
        native["dtype"] = dtype
    native.update({key: flat[key] for key in _CALLER_KEYS if key in flat})
    return native


def native_to_published(config: LongLLaVAConfig, vision_tower: str) -> dict[str, Any]:
    """
    The inverse of [`published_to_native`]: the content of a `config.json` in the authors' layout.

    Args:
        config ([`LongLLaVAConfig`]).
        vision_tower (`str`): what to write as `mm_vision_tower`.

    Raises:
        ValueError: where the decoder is not LongLLaVA's own, or its layer types are not periodic, which that layout
            cannot say.
    """
    if not has_own_decoder(config):
        raise ValueError(
            f"Only a `{LongLLaVATextConfig.model_type}` decoder has a published layout, but this model's is"
            f" `{config.text_config.model_type}`."
        )
    if config.pooling_order != "before_projector":
        raise ValueError(
            'The published layout pools before the projector, this model has `pooling_order="after_projector"`.'
        )
    flat = config.text_config.to_dict()
    if "layer_types" in flat:
        raise ValueError(
            "The published layout has `attn_layer_period` and `attn_layer_offset`, but this model has other"
            f" `layer_types`: {flat['layer_types']}."
        )
    for key in ("model_type", "transformers_version", "architectures", "_name_or_path"):
        flat.pop(key, None)
    for name, key in _PUBLISHED_KEYS.items():
        published = {native: value for value, native in _PUBLISHED_VALUES.get(key, {}).items()}
        flat[key] = published.get(getattr(config, name), getattr(config, name))
    dtype = flat.pop("dtype", None) or str(config.dtype or "float32").removeprefix("torch.")
    return {
        **flat,
        "model_type": LlavaJambaConfig.model_type,
        "architectures": ["LlavaJambaForCausalLM"],
        "mm_vision_tower": vision_tower,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "torch_dtype": dtype,
    }


__all__ = ["LAYER_TYPES", "SUPPORTED_DECODERS", "LongLLaVAConfig", "LongLLaVATextConfig"]
