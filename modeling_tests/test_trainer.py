"""Transformers' `Trainer` on the model, in ways that people use it: what goes wrong in silence elsewhere must be right here."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from longllava_hf import LongLLaVAForCausalLM, LongLLaVAForConditionalGeneration, LongLLaVAInt8Config
from longllava_hf.compat_longllava import get_cache

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


@pytest.mark.parametrize("kind", ["whole", "decoder", "peft"])
def test_smoothed_labels_are_shifted(tmp_path, kind):
    model, batch = fresh(), collate(rows(2))
    if kind == "decoder":
        text = LongLLaVAForCausalLM(small_config().text_config)
        model, batch = text, {name: batch[name][:, 5:] for name in ("input_ids", "labels")}
    elif kind == "peft":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=0.1)
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        loss = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(loss, cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.1))


def test_predictions_are_logits_alone(tmp_path):
    seen = {}

    def metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        return {}

    model = fresh(text_config={"output_router_logits": True})
    trainer = trainer_of(model, tmp_path)
    trainer.compute_metrics = metrics
    trainer.evaluate()
    assert seen["shape"] == (2, 12, 120)


def test_no_cache_is_built_for_a_loss():
    model, batch = fresh(), collate(rows(2))
    assert get_cache(model.train()(**batch)) is None
    assert get_cache(model.eval()(**batch)) is None
    assert get_cache(model(**batch, use_cache=True)) is not None
    labels = batch.pop("labels")
    assert get_cache(model(**batch)) is not None
    assert get_cache(model.train()(**batch)) is None
    decoder, ids = LongLLaVAForCausalLM(small_config().text_config), batch["input_ids"][:, 5:]
    assert get_cache(decoder(input_ids=ids, labels=labels[:, 5:])) is None


@pytest.mark.parametrize("decoder", ["longllava_text", "qwen2"])
def test_boundaries_beside_a_mask(decoder):
    """Packed rows beside a mask of ones are kept apart, and refused beside one with padding; what padding makes of positions is none."""
    torch.manual_seed(0)
    text = {"model_type": decoder, **({"num_experts": 1} if decoder == "qwen2" else {})}
    model = LongLLaVAForConditionalGeneration(small_config(text_config=text)).eval()
    ids = torch.randint(10, 120, (2, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    ones = torch.ones_like(ids)
    with torch.no_grad():
        apart = torch.cat([model(input_ids=part).logits for part in (ids[:, :4], ids[:, 4:])], dim=1)
        torch.testing.assert_close(model(ids, position_ids=positions, attention_mask=ones).logits, apart)
        padded = ones.clone()
        padded[0, -2:] = 0
        with pytest.raises(ValueError, match="Packed sequences cannot be combined with padding"):
            model(ids, position_ids=positions, attention_mask=padded)
        left = ones.clone()
        left[0, :3] = 0
        for filler in (1, 0):
            positions = (left.cumsum(-1) - 1).masked_fill(left == 0, filler)
            together = model(ids, position_ids=positions, attention_mask=left).logits
            torch.testing.assert_close(together[:1, 3:], model(ids[:1, 3:]).logits)
            torch.testing.assert_close(together[1:], model(ids[1:]).logits)


def test_nothing_to_learn_is_an_error(tmp_path):
    model, batch = fresh(), collate(rows(2))
    for labels in (torch.full_like(batch["labels"], -100), batch["input_ids"].where(batch["input_ids"] == 5, -100)):
        labels[:, 0] = 7  # which nothing predicts
        with pytest.raises(ValueError, match=r"nothing to learn in any of the samples \[0, 1\]"):
            model(**{**batch, "labels": labels})
        with pytest.raises(ValueError, match="nothing to learn"):
            model(**{**batch, "labels": labels}, num_items_in_batch=torch.tensor(0))
    # One of several batches of a step may have no label.
    loss = model(
        **{**batch, "labels": torch.full_like(batch["labels"], -100)}, num_items_in_batch=torch.tensor(3)
    ).loss
    loss.backward()
    assert loss == 0
    one = {**batch, "labels": batch["labels"].clone()}
    one["labels"][0] = -100
    assert torch.isfinite(model(**one).loss)
    dataset = rows(4)
    for row in dataset[:2]:
        row["labels"][:] = -100
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "max_steps": 2}
    trainer = trainer_of(fresh(), tmp_path, dataset, train_sampling_strategy="sequential", **options)
    with pytest.raises(ValueError, match=r"nothing to learn in any of the samples \[0\]"):
        trainer.train()


@pytest.mark.parametrize("steps", [1, 2])
def test_placeholders_are_no_labels(tmp_path, steps):
    """Whatever `Trainer` counted; which it alone can put right for several batches."""
    dataset = rows(4)
    masked = [{**row, "labels": row["input_ids"].masked_fill(row["input_ids"] == 5, -100)} for row in dataset]
    unmasked = [{**row, "labels": row["input_ids"]} for row in dataset]
    model = fresh()
    loss = model(**collate(masked)).loss
    torch.testing.assert_close(model(**collate(unmasked)).loss, loss)
    shifted = nn.functional.pad(collate(unmasked)["labels"], (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(**collate(unmasked), shift_labels=shifted).loss, loss)
    options = {"gradient_accumulation_steps": steps, "max_steps": 1}
    expected = fresh()
    trainer_of(expected, tmp_path, masked, **options).train()
    if steps == 2:
        with pytest.raises(ValueError, match=r"8 are placeholders of pictures .*LongLLaVADataCollator"):
            trainer_of(fresh(), tmp_path, unmasked, **options).train()
    else:
        model = fresh()
        trainer_of(model, tmp_path, unmasked, **options).train()
        assert_same_weights(model, expected)


@pytest.mark.parametrize("tower, layer", [("clip_vision_model", -2), ("clip_vision_model", -1), ("dinov2", -2)])
def test_all_that_is_trained_gets_a_gradient(tower, layer):
    """For which DDP waits; of the tower's last layers, and of the token that stands for a masked patch, there is none."""
    vision = {"model_type": tower, "num_hidden_layers": 3}
    model = fresh(vision_config=vision, vision_feature_layer=layer, text_config={"num_experts": 1})
    stored = set(model.state_dict())
    model.requires_grad_(True).train()
    model(**collate(rows(2))).loss.backward()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == frozen
    assert frozen and all(".vision_tower." in name for name in frozen)
    assert set(model.state_dict()) == stored


def test_adapters_that_nothing_reads_are_frozen():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(fresh(), peft.LoraConfig(target_modules=r".*vision_tower.*(q_proj|fc1)"))
    model.train()(**collate(rows(2))).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("layers.1." in name for name in trained)
