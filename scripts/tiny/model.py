# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""The small checkpoint before it has learned anything, but for its tower: tokenizer, configuration, processor."""

import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPVisionModel, PreTrainedTokenizerFast

from longllava_hf import (
    LongLLaVAConfig,
    LongLLaVAForConditionalGeneration,
    LongLLaVAImageProcessor,
    LongLLaVAProcessor,
)

from .pictures import IMAGE_SIZE
from .tasks import all_words


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every tag, and every word that a row may say, is one piece; spaces are pieces too."""
    specials = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|unk|>", "<image>"]
    pieces = Regex(r"<[^<>\s]*>|[0-9]|\s|[^\W\d]+|[^\w\s]")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = {word for text in all_words() for word in re.findall(r"[^\W\d]+", text)}
    tags = ["<|User|>", "<|Assistant|>", "<vid>", "</vid>", "<img>", "</img>", "<t>"]
    corpus = [*sorted(words), *tags] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=4,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", pair="<|startoftext|> $A $B", special_tokens=[("<|startoftext|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model_and_processor(
    tower: str | Path | None = None, hidden_size: int = 96, num_hidden_layers: int = 8, **text_config
) -> tuple[LongLLaVAForConditionalGeneration, LongLLaVAProcessor]:
    """
    Args:
        tower (`str` or `Path`, *optional*): a folder that `tiny.tower` wrote; it is one layer short of the tower that
            LongLLaVA has, whose last layer nobody reads.
    """
    from .tower import tower_config

    tokenizer = build_tokenizer()
    if tower is not None:
        trained = CLIPVisionModel.from_pretrained(tower)
        vision_config = trained.config.to_dict()
        vision_config["num_hidden_layers"] += 1
    else:
        vision_config = tower_config().to_dict()
    config = LongLLaVAConfig(
        vision_config=vision_config,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 4,
            # 0.02 suits a width of 4096; a hundred channels want what keeps the size of their inputs.
            "initializer_range": 0.08,
            "router_aux_loss_coef": 0.01,
            "output_router_logits": True,
            "max_position_embeddings": 65536,
            "tie_word_embeddings": True,
            **text_config,
        },
        # A name that is read and a name that is said are one: most answers repeat something.
        tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    image_processor = LongLLaVAImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_seq_length=config.image_seq_length,
    )
    model = LongLLaVAForConditionalGeneration(config)
    if tower is not None:
        model.model.vision_tower.load_state_dict(trained.state_dict(), strict=False)
    with torch.no_grad():
        # Words loud and layers quiet, so that at first what is read passes through all layers unharmed; pictures no louder
        # than words.
        model.get_input_embeddings().weight.mul_(4)
        for name, parameter in model.model.language_model.named_parameters():
            if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.2)
        model.model.language_model.final_layernorm.weight.fill_(0.25)
        model.model.multi_modal_projector.linear_2.weight.mul_(0.4)
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 16
    return model, LongLLaVAProcessor(image_processor, tokenizer)
