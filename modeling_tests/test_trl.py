"""TRL's trainers, from the path of a checkpoint, with pictures."""

import math
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import longllava_hf
from longllava_hf import LongLLaVAForCausalLM, LongLLaVAForConditionalGeneration
from longllava_hf.compat_longllava import add_to_transformers

from .conftest import KINDS, published


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("datasets", reason="datasets is not installed")
    return pytest.importorskip("trl", reason="trl is not installed")


@pytest.fixture(scope="module")
def pictures():
    return [Image.open(f"{EXAMPLES}/{name}.png").convert("RGB") for name in ("three", "seven")]


PROMPT = [{"role": "user", "content": "Which digit is this?"}]


def say(text):
    return [{"role": "assistant", "content": text}]


def rows_of(kind, pictures):
    """Two or four rows as TRL's documentation writes them for its trainers."""
    if kind == "messages":
        return [{"messages": PROMPT + say(x), "images": [picture]} for x, picture in zip("37", pictures)]
    if kind == "completion":
        return [{"prompt": PROMPT, "completion": say(x), "images": [picture]} for x, picture in zip("37", pictures)]
    if kind == "preference":
        pairs = zip("37", "73", pictures)
        return [{"prompt": PROMPT, "chosen": say(x), "rejected": say(y), "images": [p]} for x, y, p in pairs]
    if kind == "unpaired":
        kinds = zip("3773", pictures * 2, (True, True, False, False))
        return [{"prompt": PROMPT, "completion": say(x), "label": y, "images": [p]} for x, p, y in kinds]
    return [{"prompt": PROMPT, "image": picture} for picture in pictures]


def trainer_of(trl, name, rows, folder, model=longllava_hf.TINY, **kwargs):
    from datasets import Dataset

    names = ("peft_config", "processing_class", "reward_funcs", "data_collator")
    given = {key: kwargs.pop(key) for key in names if key in kwargs}
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        **kwargs,
    }
    config = getattr(trl, f"{name}Config")(**settings)
    return getattr(trl, f"{name}Trainer")(model=model, args=config, train_dataset=Dataset.from_list(rows), **given)


def test_classes_are_found_in_transformers():
    for cls in (LongLLaVAForConditionalGeneration, LongLLaVAForCausalLM):
        assert getattr(sys.modules["transformers"], cls.__name__) is cls
        assert cls.__name__ in dir(transformers) and pickle.loads(pickle.dumps(cls)) is cls
    assert "LongformerModel" not in vars(sys.modules["transformers"])  # what nobody asked for is still not imported


def test_classes_are_found_by_whoever_imported_transformers_before(monkeypatch):
    earlier = ModuleType("transformers")
    monkeypatch.setitem(sys.modules, "somebody", SimpleNamespace(transformers=earlier))
    add_to_transformers(LongLLaVAForCausalLM)
    assert earlier.LongLLaVAForCausalLM is LongLLaVAForCausalLM


@pytest.mark.parametrize("name", [longllava_hf.TINY, *map(published, KINDS)])
def test_trl_finds_the_class(trl, name):
    from trl.trainer.utils import create_model_from_path

    assert type(create_model_from_path(str(name))) is LongLLaVAForConditionalGeneration


def aux_loss(trainer):
    return trainer.router_aux_loss_coef * trainer.state.log_history[0]["aux_loss"]


def test_sft_learns_every_token_but_those_of_pictures(trl, pictures, tmp_path, tiny_model):
    trainer = trainer_of(trl, "SFT", rows_of("messages", pictures), tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    image_token = tiny_model.config.image_token_id
    expected = batch["input_ids"].masked_fill(
        (batch["input_ids"] == image_token) | (batch["attention_mask"] == 0), -100
    )
    assert (batch["input_ids"] == image_token).sum() == 8 and torch.equal(batch["labels"], expected)
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        logits = tiny_model(**inputs).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), expected[:, 1:].flatten())
    trainer.train()
    history = trainer.state.log_history
    assert history[0]["aux_loss"] > 1
    assert history[0]["loss"] == pytest.approx(float(loss) + aux_loss(trainer), abs=1e-4)
    assert history[1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("settings", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}], ids=str)
def test_no_sft_loss_asks_for_pictures(trl, pictures, tmp_path, settings):
    trainer = trainer_of(trl, "SFT", rows_of("messages", pictures), tmp_path, **settings)
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    assert (labels != -100).any() and not (labels == trainer.model.config.image_token_id).any()
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_sft_of_a_model_without_experts(trl, pictures, tmp_path, tiny_processor):
    config = longllava_hf.LongLLaVAConfig.from_pretrained(longllava_hf.TINY).to_dict()
    config["text_config"]["num_experts"] = 1
    model = LongLLaVAForConditionalGeneration(longllava_hf.LongLLaVAConfig(**config))
    rows = rows_of("completion", pictures)
    trainer = trainer_of(trl, "SFT", rows, tmp_path, model, processing_class=tiny_processor, max_steps=1)
    trainer.train()
    assert "aux_loss" not in trainer.state.log_history[0]


@pytest.mark.parametrize("name, kind", [("SFT", "messages"), ("SFT", "completion"), ("DPO", "preference")])
def test_a_picture_that_is_cut_names_max_length(trl, pictures, tmp_path, name, kind):
    trainer = trainer_of(trl, name, rows_of(kind, pictures), tmp_path, max_length=4)
    with pytest.raises(ValueError, match=r"max_length.*4"):
        trainer.train()


def test_dpo_with_lora(trl, pictures, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["q_proj", "in_proj", "gate_up_proj"])
    trainer = trainer_of(trl, "DPO", rows_of("preference", pictures), tmp_path, peft_config=config)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["loss"] == pytest.approx(math.log(2) + aux_loss(trainer), abs=1e-4)  # still its own reference
    assert second["rewards/margins"] > 0


def test_kto(trl, pictures, tmp_path):
    trainer = trainer_of(trl, "KTO", rows_of("unpaired", pictures), tmp_path)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.5 + aux_loss(trainer), abs=1e-4)


@pytest.mark.parametrize("name", ["RLOO", "GRPO"])
def test_online(trl, pictures, tmp_path, name):
    def reward(completions, **kwargs):
        return [float(i) for i in range(len(completions))]

    settings = {"num_generations": 2, "max_completion_length": 4, "temperature": 3.0}
    trainer = trainer_of(trl, name, rows_of("prompt", pictures), tmp_path, reward_funcs=reward, **settings)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    assert all(math.isfinite(step["loss"]) for step in trainer.state.log_history[:2])
    parts = ("mamba.in_proj", "experts.down_proj", "multi_modal_projector.linear_2")
    changed = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])}
    assert all(any(part in key for key in changed) for part in parts)


@pytest.mark.parametrize("name, kind", [("SFT", "messages"), ("DPO", "preference")])
def test_lazy_pictures(trl, pictures, tmp_path, name, kind):
    processor = transformers.AutoProcessor.from_pretrained(longllava_hf.TINY, lazy=True)
    trainer = trainer_of(
        trl, name, rows_of(kind, pictures), tmp_path, processing_class=processor, dataloader_num_workers=1, max_steps=1
    )
    assert isinstance(next(iter(trainer.get_train_dataloader()))["pixel_values"], longllava_hf.LazyPixelValues)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_the_authors_labels(trl, tiny_processor, tmp_path):
    """With the package's collator: settings of rows, videos, several turns and text alone, labelled as the authors do."""
    from longllava_hf.training import LongLLaVADataCollator

    three, film = f"{EXAMPLES}/three.png", f"{EXAMPLES}/film.mp4"
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "3"}]
    cut = {"patch_strategy": "best_fit", "image_grid_pinpoints": [[1, 2]], "num_frames": None}
    rows = [
        {"messages": [*turns, *PROMPT, *say("3")], "images": [three], "videos": [], "processor_kwargs": cut},
        {"messages": [{"role": "user", "content": "<video>?"}, *say("5")], "images": [], "videos": [film],
         "processor_kwargs": {"patch_strategy": None, "image_grid_pinpoints": None, "num_frames": 4}},
        {"messages": PROMPT + say("7"), "images": [], "videos": [], "processor_kwargs": None},
    ]  # fmt: skip
    collator = LongLLaVADataCollator(tiny_processor)
    options = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    options |= {"data_collator": collator, "processing_class": tiny_processor, "per_device_train_batch_size": 3}
    trainer = trainer_of(trl, "SFT", rows, tmp_path, **options)
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trainer.train()
    assert all(len(batch["pixel_values"]) == 3 + 4 for batch in seen) and len(seen) == 2
    expected = sum(int((collator.encode(row).labels != -100).sum()) for row in rows)
    assert expected == 4 + 2 + 2
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_two_hundred_pictures_do_not_fit_by_default(trl, processor):
    """1,024 tokens are TRL's default; cut through a picture, they are an error that names the setting."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    assert trl.SFTConfig("unused", bf16=False).max_length == 1024
    row = {"messages": PROMPT + say("3"), "images": [Image.new("RGB", (8, 8))] * 200}
    with pytest.raises(ValueError, match="`max_length` than 1024"):
        DataCollatorForVisionLanguageModeling(processor, max_length=1024)([row])
