"""The whole model: against the authors' golden outputs, and against itself in every way of splitting the work."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from longllava_hf import LongLLaVAForConditionalGeneration, LongLLaVAImageProcessor, LongLLaVAModel
from longllava_hf.convert import convert_checkpoint
from longllava_hf.generation_longllava import PREFILL_CHUNK_SIZES
from longllava_hf.modeling_longllava import pool_patches

from .conftest import KINDS, golden, golden_images, published, small_config


def with_other_names(folder, destination):
    """A published checkpoint under the other family of names, in shards of `.bin` files."""
    import json
    import shutil

    from safetensors.torch import load_file

    shutil.copytree(folder, destination, ignore=lambda *_: ["model.safetensors"])
    config = json.loads((folder / "config.json").read_text())
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        if layer is not None:
            dense = config["num_experts"] == 1 or layer % 2 == 0
            name = (
                name.replace(".moe.experts.0.", ".feed_forward.") if dense else name.replace(".moe.", ".feed_forward.")
            )
            name = name.replace("pre_moe_layernorm", "pre_ff_layernorm")
            name = name.replace("B_layernorm", "b_layernorm").replace("C_layernorm", "c_layernorm")
        renamed[name] = tensor
    names = sorted(renamed)
    weight_map = {}
    for i in range(3):
        shard = f"pytorch_model-{i + 1:05}-of-00003.bin"
        torch.save({n: renamed[n] for n in names[i::3]}, destination / shard)
        weight_map.update(dict.fromkeys(names[i::3], shard))
    index = {"metadata": {}, "weight_map": weight_map}
    (destination / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return destination


@pytest.fixture(params=["as published", "saved", "converted", "converted back", "other names"])
def checkpoint(request, published_copy, tmp_path):
    """A function that gives the same checkpoint in each of the forms it can take."""

    def make(kind):
        folder = published_copy(kind)
        if request.param == "as published":
            return folder
        if request.param == "other names":
            return with_other_names(folder, folder.parent / "renamed")
        if request.param == "saved":
            AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(tmp_path / "saved")
            AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "saved")
            return tmp_path / "saved"
        native = convert_checkpoint(str(folder), str(tmp_path / "native"))
        if request.param == "converted":
            return native
        return convert_checkpoint(str(native), str(tmp_path / "published"), to="published")

    return make


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_golden(kind, checkpoint):
    expected, folder = golden(kind), checkpoint(kind)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert type(model) is LongLLaVAForConditionalGeneration and model.dtype == torch.float32

    pixel_values = processor.image_processor(golden_images(kind), return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(pixel_values[:, :, ::8, ::8].numpy(), expected["pixel_values"], rtol=0, atol=1e-6)

    features = torch.stack(model.get_image_features(pixel_values).pooler_output)
    np.testing.assert_allclose(features.numpy(), expected["image_features"], rtol=0, atol=1e-4)

    ids = [[int(i)] if i != -200 else [model.config.image_token_id] * 144 for i in expected["input_ids"]]
    ids = torch.tensor([[i for part in ids for i in part]])
    images = pixel_values[: int((expected["input_ids"] == -200).sum())]
    logits = model(ids, pixel_values=images).logits[0, -16:]
    np.testing.assert_allclose(logits.numpy(), expected["last_logits"], rtol=0, atol=1e-3)

    text_ids = torch.from_numpy(expected["text_ids"])[None]
    np.testing.assert_allclose(model(text_ids).logits[0, -16:].numpy(), expected["text_logits"], rtol=0, atol=1e-3)

    generated = model.generate(input_ids=ids, pixel_values=images, max_new_tokens=24, do_sample=False)
    assert generated[0, ids.shape[1] :].tolist() == expected["generated"].tolist()


def test_the_class_that_the_authors_users_call():
    assert type(AutoModelForCausalLM.from_pretrained(published("moe"))) is LongLLaVAForConditionalGeneration


IMAGE, TOKENS = 5, 4


def prompt(*parts, seed=0):
    """Ids in which a number is that many tokens of text, and an "i" a picture."""
    generator = torch.Generator().manual_seed(seed)
    ids = [
        [IMAGE] * TOKENS if part == "i" else torch.randint(6, 120, (part,), generator=generator).tolist()
        for part in parts
    ]
    return [i for part in ids for i in part]


PROMPTS = [prompt(3, "i", 2, "i", 6), prompt(9, seed=1), prompt("i", 20, "i", "i", 1, seed=2)]
PIXELS = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PIXELS_OF = [PIXELS[:2], None, PIXELS[2:]]


def pad(prompts, side, spare=3):
    length = max(map(len, prompts)) + spare
    ids, mask = (
        torch.zeros(len(prompts), length, dtype=torch.long),
        torch.zeros(len(prompts), length, dtype=torch.long),
    )
    for i, row in enumerate(prompts):
        begin = {"left": length - len(row), "right": 0}[side]
        ids[i, begin : begin + len(row)] = torch.tensor(row)
        mask[i, begin : begin + len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": PIXELS}


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 1, 7, 64])
@pytest.mark.parametrize("side", ["left", "right"])
def test_chunks_and_padding_give_the_logits_of_one_row_in_one_pass(small_model, side, chunk):
    inputs = pad(PROMPTS, side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    features = torch.cat(small_model.get_image_features(PIXELS).pooler_output)
    row_of = (ids == IMAGE).flatten().cumsum(0).view_as(ids) - 1
    cache, pieces = DynamicCache(config=small_model.config), []
    for begin in range(0, ids.shape[1], chunk or ids.shape[1]):
        end = min(begin + (chunk or ids.shape[1]), ids.shape[1])
        piece = ids[:, begin:end]
        mine = features[row_of[:, begin:end][piece == IMAGE]]
        images = (
            {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=[mine])}} if len(mine) else {}
        )
        pieces.append(small_model(piece, attention_mask=mask[:, :end], past_key_values=cache, **images).logits)
    logits = torch.cat(pieces, dim=1)
    for i, row in enumerate(PROMPTS):
        alone = small_model(torch.tensor([row]), pixel_values=PIXELS_OF[i]).logits[0]
        torch.testing.assert_close(logits[i][mask[i].bool()], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 64},
        {"num_beams": 3},
        {"num_beams": 3, "prefill_chunk_size": 6},
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
    ],
)
def test_generate_alone_or_in_a_batch(small_model, side, options):
    inputs = pad(PROMPTS, side)
    if side == "right" and not options.get("use_cache", True):
        pytest.skip("without a cache, generate reads the last position, which must hold a token")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **options}
    before = inputs["attention_mask"].clone()
    batch = small_model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(inputs["attention_mask"], before)
    alone = []
    for row, pixels in zip(PROMPTS, PIXELS_OF):
        alone.append(small_model.generate(torch.tensor([row]), pixel_values=pixels, **options)[:, len(row) :])
        plain = {k: v for k, v in options.items() if k not in ("prefill_chunk_size", "use_cache")}
        expected = small_model.generate(torch.tensor([row]), pixel_values=pixels, **plain)[:, len(row) :]
        assert torch.equal(alone[-1], expected)
    assert torch.equal(batch, torch.cat(alone))


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 5}])
@pytest.mark.parametrize("pictures", ["all", "new"])
def test_second_turn_on_a_kept_cache(small_model, options, pictures):
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
    cache = DynamicCache(config=small_model.config)
    first = torch.tensor([PROMPTS[0]])
    first = small_model.generate(first, pixel_values=PIXELS[:2], past_key_values=cache, **options)
    second = torch.cat([first, torch.tensor([PROMPTS[2]])], dim=1)
    expected = small_model.generate(second, pixel_values=PIXELS, **options)
    pixels = PIXELS if pictures == "all" else PIXELS[2:]
    found = small_model.generate(second, pixel_values=pixels, past_key_values=cache, **options)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_inputs_embeds(small_model):
    row = torch.tensor([PROMPTS[1]])
    embeds = small_model.get_input_embeddings()(row)
    torch.testing.assert_close(small_model(inputs_embeds=embeds).logits, small_model(row).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = small_model.generate(row, **options)[:, row.shape[1] :]
    assert torch.equal(small_model.generate(inputs_embeds=embeds, **options), expected)
    assert torch.equal(small_model.generate(inputs_embeds=embeds, prefill_chunk_size=2, **options), expected)
    with_images = torch.tensor([PROMPTS[0]])
    embeds = small_model.get_input_embeddings()(with_images)
    expected = small_model(with_images, pixel_values=PIXELS[:2]).logits
    torch.testing.assert_close(small_model(inputs_embeds=embeds, pixel_values=PIXELS[:2]).logits, expected)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 5}, {"num_beams": 2}])
def test_inputs_embeds_with_pictures_in_a_batch(small_model, options):
    inputs = pad(PROMPTS, "left")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, **options}
    expected = small_model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    inputs["inputs_embeds"] = small_model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(small_model.generate(**inputs, **options), expected)


def test_the_placeholder_is_never_said(small_model):
    with torch.no_grad():
        small_model.lm_head.weight[IMAGE] = small_model.lm_head.weight.abs().sum(0) * 100
    for options in ({}, {"suppress_tokens": [7]}):
        output = small_model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=10, do_sample=False, **options)
        assert IMAGE not in output[0, len(PROMPTS[1]) :]


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("options", [None, {}, {"prefill_chunk_size": 4}, {"num_beams": 2}])
def test_mismatch_names_both_counts(small_model, images, options):
    row = torch.tensor([PROMPTS[0]])
    message = f"^Image features and image tokens do not match, tokens: 8, features: {4 * images}"
    with pytest.raises(ValueError, match=message):
        if options is None:
            small_model(row, pixel_values=PIXELS[:images])
        else:
            small_model.generate(row, pixel_values=PIXELS[:images], max_new_tokens=2, **options)


def test_inputs_that_exclude_each_other(small_model):
    row = torch.tensor([PROMPTS[0]])
    outputs = {"image": small_model.get_image_features(PIXELS[:2])}
    with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
        small_model(row, pixel_values=PIXELS[:2], mm_encoder_outputs=outputs)
    with pytest.raises(ValueError, match="exactly one"):
        small_model(pixel_values=PIXELS[:2])


@torch.no_grad()
def test_outputs(small_model):
    outputs = small_model(
        torch.tensor([PROMPTS[0]]),
        pixel_values=PIXELS[:2],
        output_router_logits=True,
        output_hidden_states=True,
        logits_to_keep=1,
    )
    assert len(outputs.router_logits) == 4 and len(outputs.hidden_states) == 9
    assert outputs.image_hidden_states.shape == (8, 32) and outputs.logits.shape == (1, 1, 120)
    base = small_model.model(torch.tensor([PROMPTS[0]]), pixel_values=PIXELS[:2], output_router_logits=True)
    assert len(base.router_logits) == 4 and base.last_hidden_state.shape == (1, 19, 32)


@torch.no_grad()
def test_many_images_are_encoded_in_batches(small_model):
    pixels = torch.randn(130, 3, 16, 16)
    features = small_model.get_image_features(pixels).pooler_output
    assert len(features) == 130 and features[0].shape == (4, 32)
    torch.testing.assert_close(features[129], small_model.get_image_features(pixels[129:]).pooler_output[0])


@torch.no_grad()
@pytest.mark.parametrize("road", ["generate", "prefill", "forward"])
def test_pictures_that_come_as_they_are_needed(small_model, road, tmp_path):
    """Encoded `vision_batch_size` at a time, with the answer of all at once."""
    generator = np.random.default_rng(0)
    files = []
    for i in range(7):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(files[-1])
    processor = LongLLaVAImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_seq_length=4
    )
    now, lazy = (processor(files, return_tensors="pt", lazy=lazy)["pixel_values"] for lazy in (False, True))
    ids = torch.tensor([[7, 8, *[5] * 28, 9, 10]])
    sizes = []
    hook = small_model.model.vision_tower.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    small_model.config.vision_batch_size = 3
    found = []
    for pixels in (lazy, now):
        if road == "generate":
            found.append(small_model.generate(ids, pixel_values=pixels, max_new_tokens=5, do_sample=False))
        elif road == "prefill":
            found.append(small_model.prefill(ids, pixel_values=pixels).cache.layers[0].recurrent_states[0])
        else:
            found.append(small_model(ids, pixel_values=pixels).logits)
    hook.remove()
    assert torch.equal(*found) and sizes == [3, 3, 1] * 2
    with pytest.raises(StrictDataclassClassValidationError, match="`vision_batch_size` must be at least 1, but is 0"):
        small_config(vision_batch_size=0)


def test_a_picture_that_changed_after_it_was_counted(small_model, tmp_path):
    processor = LongLLaVAImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_seq_length=4
    )
    Image.new("RGB", (48, 48)).save(tmp_path / "x.png")
    lazy = processor(tmp_path / "x.png", lazy=True, patch_strategy="best_fit")["pixel_values"]
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    ids = torch.tensor([[7, *[5] * 4 * len(lazy), 9]])
    with pytest.raises(ValueError, match=r"`pixel_values` should hold 10 pictures, but 2 came"):
        small_model.generate(ids, pixel_values=lazy, max_new_tokens=2)


@torch.no_grad()
def test_long_prompts_are_read_in_chunks(small_model, monkeypatch):
    monkeypatch.setitem(PREFILL_CHUNK_SIZES, "cpu", 16)
    ids = torch.randint(6, 120, (1, 50), generator=torch.Generator().manual_seed(0))
    lengths, logits = [], []
    hook = small_model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    head = small_model.lm_head.register_forward_pre_hook(lambda _, args: logits.append(args[0].shape[1]))
    arguments = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    chunked = small_model.generate(ids, **arguments)
    assert lengths == [16, 16, 16, 1, 1, 1, 1] and set(logits) == {1}
    lengths.clear()
    assert torch.equal(small_model.generate(ids, prefill_chunk_size=50, **arguments), chunked)
    assert lengths == [49, 1, 1, 1]
    hook.remove(), head.remove()


def test_pooling():
    patches = torch.randn(2, 576, 7)
    square = patches.view(2, 12, 2, 12, 2, 7)
    torch.testing.assert_close(pool_patches(patches, "2d"), square.mean(dim=(2, 4)).flatten(1, 2))
    sequence = pool_patches(patches, "1d")
    assert sequence.shape == (2, 144, 7)
    torch.testing.assert_close(sequence, (patches[:, 1::4] + patches[:, 2::4]) / 2)
    assert pool_patches(patches, "none") is patches


@torch.no_grad()
@pytest.mark.parametrize("order", ["before_projector", "after_projector"])
@pytest.mark.parametrize("mode", ["2d", "1d", "none"])
@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_pooling_orders_and_projectors(order, mode, projector):
    config = small_config(pooling_order=order, pooling_mode=mode, projector_type=projector)
    model = LongLLaVAModel(config).eval()
    features = model.get_image_features(PIXELS).pooler_output
    assert features[0].shape == (config.image_seq_length, 32)
    patches = model.vision_tower(PIXELS, output_hidden_states=True).hidden_states[-2][:, 1:]
    project = model.multi_modal_projector
    before, after = project(pool_patches(patches, mode)), pool_patches(project(patches), mode)
    torch.testing.assert_close(torch.stack(features), before if order == "before_projector" else after)


def test_another_decoder(tmp_path):
    """The glue does not know its decoder: Qwen2, with positions, in a batch, in chunks and with beams."""
    torch.manual_seed(0)
    text = Qwen2Config(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = small_config()
    config = type(config)(text_config=text, vision_config=config.vision_config, image_token_id=500)
    model = LongLLaVAForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    prompts = [[500 if i == IMAGE else i for i in row] for row in PROMPTS]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for side in ("left", "right"):
        inputs = pad(prompts, side)
        for extra in ({}, {"prefill_chunk_size": 5}, {"num_beams": 3}):
            batch = model.generate(**inputs, **options, **extra)[:, inputs["input_ids"].shape[1] :]
            beams = {k: v for k, v in extra.items() if k == "num_beams"}
            for i, (row, pixels) in enumerate(zip(prompts, PIXELS_OF)):
                alone = model.generate(torch.tensor([row]), pixel_values=pixels, **options, **beams)[0, len(row) :]
                assert torch.equal(batch[i], alone), (side, extra, i)


def test_trainer_lowers_the_loss_and_reloads(small_model, tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            row = torch.tensor(PROMPTS[0])
            labels = torch.where(row == IMAGE, -100, row)
            return {"input_ids": row, "labels": labels, "pixel_values": PIXELS[:2]}

    def collate(rows):
        batch = {k: torch.stack([row[k] for row in rows]) for k in ("input_ids", "labels")}
        return {**batch, "pixel_values": torch.cat([row["pixel_values"] for row in rows])}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        remove_unused_columns=False,
        gradient_checkpointing=True,
        save_steps=12,
        use_cpu=True,
    )
    trainer = Trainer(model=small_model, args=arguments, train_dataset=Rows(), data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-12").eval()
    row = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        expected = small_model.eval()(row, pixel_values=PIXELS[:2]).logits
        torch.testing.assert_close(reloaded(row, pixel_values=PIXELS[:2]).logits, expected)


def test_auxiliary_loss_and_ignored_labels(small_model):
    row = torch.tensor([PROMPTS[0]])
    labels = row.clone()
    labels[:, :10] = -100
    plain = small_model(row, pixel_values=PIXELS[:2], labels=labels)
    outputs = small_model(row, pixel_values=PIXELS[:2], labels=labels, output_router_logits=True)
    logits = plain.logits[0, 9:-1].float()
    targets = row[0, 10:].masked_fill(row[0, 10:] == IMAGE, -100)
    torch.testing.assert_close(plain.loss, torch.nn.functional.cross_entropy(logits, targets))
    torch.testing.assert_close(outputs.loss, plain.loss + 0.001 * outputs.aux_loss)


def test_no_pictures_as_an_empty_tensor(small_model):
    ids = torch.arange(6, 20)[None]
    empty = torch.empty(0, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(small_model(ids, pixel_values=empty).logits, small_model(ids).logits)
    expected = small_model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(small_model.generate(ids, pixel_values=empty, max_new_tokens=3, do_sample=False), expected)


def test_pictures_given_twice_are_refused(small_model):
    ids, pixels = torch.tensor([[5] * 4 + [7]]), torch.randn(1, 3, 16, 16)
    encoded = {"image": small_model.get_image_features(pixels, return_dict=True)}
    with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
        small_model.generate(ids, pixel_values=pixels, mm_encoder_outputs=encoded)
