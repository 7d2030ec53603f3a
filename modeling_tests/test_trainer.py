"""Transformers' `Trainer` on the model, in ways that people use it: what goes wrong in silence elsewhere must be right here."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from longllava_hf import LongLLaVAForConditionalGeneration, LongLLaVAInt8Config

from .conftest import small_config


def fresh(seed: int = 0, **kwargs) -> LongLLaVAForConditionalGeneration:
    torch.manual_seed(seed)
    return LongLLaVAForConditionalGeneration(small_config(**kwargs))


def rows(count: int, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Each a picture of four placeholders, and text, of which the second half is learned."""
    generator = torch.Generator().manual_seed(0)
    dataset = []
    for _ in range(count):
        ids = torch.randint(10, 120, (length,), generator=generator)
        ids[1:5] = 5
        labels = ids.clone()
        labels[: length // 2] = -100
        dataset.append(
            {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(3, 16, 16, generator=generator)}
        )
    return dataset


def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in batch]) for key in batch[0]}


def trainer_of(model, folder, dataset=None, callbacks=None, **kwargs) -> Trainer:
    options = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "remove_unused_columns": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**{**options, **kwargs})
    dataset = rows(8) if dataset is None else dataset
    return Trainer(model, arguments, collate, dataset, eval_dataset=dataset[:2], callbacks=callbacks)


def assert_same_weights(model, other) -> None:
    weights = model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in other.state_dict().items())


class Stop(TrainerCallback):
    """As a process that is killed after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("tied", [False, True])
def test_resuming_gives_the_weights_of_an_undisturbed_run(tmp_path, tied):
    """Bit for bit, experts and attention dropout included."""
    config = {"text_config": {"attention_dropout": 0.1, "tie_word_embeddings": tied}}
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 4}
    undisturbed = fresh(**config)
    trainer_of(undisturbed, tmp_path / "undisturbed", **options).train()
    trainer_of(fresh(**config), tmp_path / "killed", callbacks=[Stop(5)], **options).train()
    shutil.rmtree(tmp_path / "killed" / "checkpoint-5", ignore_errors=True)
    resumed = fresh(1, **config)
    with CaptureLogger(logging.get_logger("transformers.trainer")) as log:
        trainer_of(resumed, tmp_path / "killed", **options).train(resume_from_checkpoint=True)
    assert_same_weights(undisturbed, resumed)
    assert "keys" not in log.out


def test_the_best_model_is_restored(tmp_path):
    """A learning rate that harms makes the first checkpoint the best one."""
    model = fresh()
    best = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    trainer = trainer_of(model, tmp_path, learning_rate=1.0, load_best_model_at_end=True, **{**best, "max_steps": 2})
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert_same_weights(model, type(model).from_pretrained(tmp_path / "checkpoint-1"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    fresh().save_pretrained(folder, max_shard_size="100KB")
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    counts = [
        sum(f"layers.{layer}.feed_forward.experts." in name for name in file) for file in files for layer in (1, 3)
    ]
    assert any(0 < count < 12 for count in counts)  # experts of one layer in several files
    return folder, {name: tensor for file in files for name, tensor in file.items()}


def test_load_state_dict(saved):
    """Of what `save_pretrained` wrote and of what `state_dict` gives, strictly; and of one decoder alone."""
    _, stored = saved
    expected, model = fresh(), fresh(1)
    assert any(".experts.3.up_proj." in name for name in stored)
    model.load_state_dict(stored)
    assert_same_weights(model, expected)
    model = fresh(1)
    model.load_state_dict(expected.state_dict())
    assert_same_weights(model, expected)
    with torch.device("meta"):
        model = LongLLaVAForConditionalGeneration(small_config())
    model.load_state_dict(stored, assign=True, strict=False)
    layer = model.model.language_model.layers[1].feed_forward
    assert_same_weights(layer, expected.model.language_model.layers[1].feed_forward)
    layer = fresh(1).model.language_model.layers[1].feed_forward.experts
    prefix = "model.language_model.layers.1.feed_forward.experts."
    layer.load_state_dict({n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)})
    assert_same_weights(layer, expected.model.language_model.layers[1].feed_forward.experts)


def test_load_state_dict_file_by_file(saved):
    """As `Trainer` loads a checkpoint of several files, among which experts of one layer may be spread."""
    from transformers.trainer_utils import load_sharded_checkpoint

    model = fresh(1)
    load_sharded_checkpoint(model, saved[0], strict=False)
    assert_same_weights(model, fresh())


def test_load_state_dict_names_what_does_not_fit(saved):
    name = "model.language_model.layers.3.feed_forward.experts.2.up_proj.weight"
    stored = {key: value for key, value in saved[1].items() if key != name}
    model = fresh(1)
    before = model.model.language_model.layers[3].feed_forward.experts.gate_up_proj.weight.detach().clone().chunk(8)
    assert model.load_state_dict(stored, strict=False).missing_keys == [name]
    after = model.model.language_model.layers[3].feed_forward.experts.gate_up_proj.weight.chunk(8)
    assert torch.equal(after[5], before[5]) and torch.equal(after[4], stored[name.replace("up_proj", "gate_proj")])
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        model.load_state_dict(stored)
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        model.load_state_dict({**stored, name: torch.zeros(47, 32)}, strict=False)
    stacked = "model.language_model.layers.3.feed_forward.experts.down_proj.weight"
    both = {**saved[1], stacked: model.state_dict()[stacked]}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers.3.feed_forward.experts.0.down_proj"):
        model.load_state_dict(both)


def test_load_state_dict_refuses_to_cast_to_int8(saved):
    """Which torch would do without a word."""
    options = {"quantization_config": LongLLaVAInt8Config()}
    model = LongLLaVAForConditionalGeneration.from_pretrained(saved[0], **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"experts.0.gate_proj.weight cannot be put into .* quantised") as error:
        model.load_state_dict(saved[1], strict=False)
    assert "q_proj.weight must be int8" in str(error.value)
    model.load_state_dict(before)
    assert_same_weights(model, LongLLaVAForConditionalGeneration.from_pretrained(saved[0], **options))
