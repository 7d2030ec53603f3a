"""`longllava train`: what each stage changes, and that an interrupted run ends as an undisturbed one."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainingArguments

import longllava_hf
from longllava_hf.cli import main
from longllava_hf.training import plan_bins
from longllava_hf.training.recipe import MixedDataset, last_checkpoint, read_recipe, train


# Renamed in Transformers 5.24.
CHECKPOINTING = {"activation_checkpointing", "gradient_checkpointing"} & {
    field.name for field in fields(TrainingArguments)
}
CHECKPOINTING = min(CHECKPOINTING)

PARTS = {
    "tower": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "decoder": ("model.language_model.", "lm_head."),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    with open(folder / "rows.jsonl", "w") as stream:
        for i in range(24):
            Image.new("RGB", (30, 30), (10 * i, 0, 90)).save(folder / f"{i}.png")
            place, images = ("<image>\n", [str(folder / f"{i}.png")]) if i % 3 else ("", [])
            turns = [("user", f"{place}Which digit is this?"), ("assistant", str(i % 10))]
            messages = [{"role": role, "content": content} for role, content in turns]
            stream.write(json.dumps({"id": str(i), "messages": messages, "images": images, "videos": []}) + "\n")
    return folder / "rows.jsonl"


def write(folder: Path, name: str = "recipe", **keys) -> Path:
    recipe = {
        "model": longllava_hf.TINY,
        "stage": "single_image",
        "output_dir": str(folder / "trained"),
        "pack_to": 96,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
        "max_steps": 6,
        "save_steps": 2,
        CHECKPOINTING: False,
        **keys,
    }
    recipe = {key: value for key, value in recipe.items() if value is not None}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "model.safetensors"))


def digests(folder: str | Path) -> dict[str, str]:
    """Of the weights of each part."""
    tensors = weights(folder)
    names = {part: sorted(name for name in tensors if name.startswith(prefix)) for part, prefix in PARTS.items()}
    assert sum(map(len, names.values())) == len(tensors)
    return {
        part: hashlib.sha256(b"".join(tensors[name].contiguous().numpy().tobytes() for name in of_part)).hexdigest()
        for part, of_part in names.items()
    }


def test_three_stages(rows, tmp_path, capsys):
    """Each starts where the last one ended, and changes what it should, and all of it."""
    folder = longllava_hf.TINY
    for stage, changed in (
        ("align", {"projector"}),
        ("single_image", {"projector", "decoder"}),
        ("multi_image", {"projector", "decoder"}),
    ):
        output_dir = str(tmp_path / stage)
        recipe = write(
            tmp_path, stage, stage=stage, model=folder, output_dir=output_dir, data=[{"path": str(rows)}], max_steps=4
        )
        assert main(["train", str(recipe)]) == 0
        report = capsys.readouterr().out
        assert "24 rows of" in report and " of 96, of which " in report and "after 4 steps" in report
        before, after = digests(folder), digests(output_dir)
        assert {part for part in PARTS if before[part] != after[part]} == changed
        old, new = weights(folder), weights(output_dir)
        same = [name for name in old if name.startswith(PARTS["projector"]) and torch.equal(old[name], new[name])]
        assert not same
        folder = output_dir
    assert Image.open(Path(folder, "lengths.png")).format == "PNG"
    # It is a checkpoint like any other.
    assert main(["ask", "--model", folder, str(Path(rows).with_name("1.png")), "Which digit is this?"]) == 0


def test_rows_in_order_are_packed_in_order(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("longllava_hf.training.recipe.PACKED_IN_ORDER", 6)
    keys = {"data": [{"path": str(rows)}], "max_steps": 1, "train_sampling_strategy": "sequential"}
    packed = train(write(tmp_path, **keys)).train_dataset
    assert packed.bins == plan_bins(packed.lengths, 96, window=6) != plan_bins(packed.lengths, 96)


@pytest.mark.slow
def test_killed_and_resumed(rows, tmp_path):
    """SIGKILL in the middle of a step; then the weights are those of an undisturbed run, bit for bit, experts included."""
    keys = {"data": [{"path": str(rows)}], "max_steps": 8, "save_total_limit": 1, CHECKPOINTING: True}
    train(write(tmp_path, "whole", output_dir=str(tmp_path / "whole"), **keys))
    recipe = write(tmp_path, "killed", output_dir=str(tmp_path / "killed"), **keys)
    script = (
        "import sys, time; from transformers import Trainer; from longllava_hf.cli import main\n"
        "step = Trainer.training_step\n"
        "def slow(self, *args, **kwargs):\n"
        "    if self.state.global_step == 5: print('now', flush=True); time.sleep(60)\n"
        "    return step(self, *args, **kwargs)\n"
        "Trainer.training_step = slow\n"
        "sys.exit(main(['train', sys.argv[1]]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(recipe)], stdout=subprocess.PIPE, text=True)
    assert any("now" in line for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert last_checkpoint(tmp_path / "killed") == str(tmp_path / "killed" / "checkpoint-4")
    # One that was killed while it saved.
    unfinished = tmp_path / "killed" / "checkpoint-6"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    trainer = train(recipe)
    assert trainer.state.global_step == 8
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == resumed.keys() and any(".experts." in name for name in whole)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert digests(tmp_path / "whole") != digests(longllava_hf.TINY)


def test_another_recipe_does_not_resume(rows, tmp_path, capsys):
    data = [{"path": str(rows)}]
    assert main(["train", str(write(tmp_path, data=data, max_steps=2))]) == 0
    assert main(["train", str(write(tmp_path, data=data, max_steps=2, save_steps=1, logging_steps=1))]) == 0
    capsys.readouterr()
    for keys, message in (
        ({"learning_rate": 2e-3}, "`learning_rate` was 0.001 and is 0.002"),
        ({"stage": "align"}, "`stage` was 'single_image' and is 'align'"),
        ({"data": [{"path": str(rows), "rows": 20}]}, "`rows` was "),
    ):
        assert main(["train", str(write(tmp_path, **{"data": data, "max_steps": 2, **keys}))]) == 2
        error = capsys.readouterr().err
        assert "has checkpoints of another recipe" in error and message in error
    os.remove(tmp_path / "trained" / "recipe.json")
    assert main(["train", str(write(tmp_path, data=data, max_steps=2))]) == 2
    assert "no `recipe.json`" in capsys.readouterr().err


def test_the_rows_are_part_of_a_recipe(rows, tmp_path, capsys):
    """Other answers of the same lengths are other data."""
    copy = tmp_path / "copy.jsonl"
    copy.write_text(rows.read_text())
    recipe = write(tmp_path, data=[{"path": str(copy)}], max_steps=2)
    assert main(["train", str(recipe)]) == 0
    copy.write_text(rows.read_text().replace('"assistant", "content": "3"', '"assistant", "content": "8"'))
    assert main(["train", str(recipe)]) == 2
    assert "`rows` was" in capsys.readouterr().err


def test_evaluation_and_epochs(rows, tmp_path):
    """Several epochs, accumulation that does not divide them, and a loss on rows that are not packed."""
    keys = {"max_steps": None, "num_train_epochs": 2, "gradient_accumulation_steps": 2, "save_strategy": "epoch"}
    keys |= {"save_steps": None, "eval_strategy": "epoch", "load_best_model_at_end": True, "logging_steps": 1}
    data = [{"path": str(rows)}]
    trainer = train(write(tmp_path, data=data, eval_data=[{"path": str(rows), "rows": 6}], **keys))
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and trainer.state.best_metric == min(losses)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        # What PyTorch 2.13 says on a file system that is full.
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 0"), "could not be written to"),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(rows, tmp_path, capsys, monkeypatch, error, message):
    """The disk fills up while the optimiser's state is written; what was saved before is there to go on from."""
    recipe = write(tmp_path, data=[{"path": str(rows)}], save_total_limit=1, max_steps=4)
    save, calls = torch.save, []

    def full(content, file, *args, **kwargs):
        calls.append(str(file))
        if "checkpoint-4" in str(file):
            Path(file).write_bytes(b"begun")
            raise error
        return save(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    assert main(["train", str(recipe)]) == 2
    assert message in capsys.readouterr().err and any("checkpoint-4" in call for call in calls)
    monkeypatch.undo()
    assert last_checkpoint(tmp_path / "trained") == str(tmp_path / "trained" / "checkpoint-2")
    assert main(["train", str(recipe)]) == 0


def test_a_sample_that_is_wrong_is_named_before_training(rows, tmp_path, capsys):
    lines = rows.read_text().splitlines()
    bad = json.loads(lines[7])
    bad["images"] = []
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:7], json.dumps(bad), *lines[8:]]))
    for keys, message in (
        ({"data": [{"path": str(tmp_path / "bad.jsonl")}]}, "Sample '7': There are 1 places for images"),
        ({"data": [{"path": str(rows)}], "pack_to": 10}, "Sample '0': It has "),
        (
            {"data": [{"path": str(rows)}], "stage": "all"},
            "`stage` must be one of ['align', 'single_image', 'multi_image']",
        ),
        ({"data": [{"path": str(rows)}], "trainable": ["head"]}, "`trainable` must be a list of"),
        ({"data": [{"path": str(rows)}], "learning_rat": 1}, "learning_rat"),
        ({"data": "rows.jsonl"}, "`data` must be a list of sources"),
        ({"data": [{"path": str(rows), "rows": 99}]}, "must be from 1 to 24"),
        ({"data": [{"path": str(rows), "ratio": 1}, {"path": str(rows)}]}, "Either all sources"),
        ({"data": [{"builder": "gone.py:rows"}]}, "There is no file `gone.py`"),
        ({"data": [{"builder": "gone_module:rows"}]}, "No module named 'gone_module'"),
        ({"data": [{"builder": "json:rows"}]}, "`json` has no function `rows`"),
        ({"data": [{"path": str(rows)}], "output_dir": None}, "must have the keys"),
        ({"data": [{"path": str(rows), "split": "test"}]}, "has no splits"),
        ({"data": [{"path": str(rows), "arguments": {}}]}, "has ['arguments']"),
        ({"data": [{"path": str(rows), "ratio": 0}]}, "positive `ratio`"),
        ({"data": [{"path": str(rows), "rows": 2.5}]}, "from 1 to 24"),
        ({"data": [{"path": str(rows)}], "truncation": "no"}, "`truncation` must be true or false"),
        ({"data": [{"path": str(rows)}], "pack_to": "96"}, "`pack_to` must be a number of tokens"),
        ({"data": [{"path": str(rows)}], "max_length": 200}, "must not exceed `pack_to`"),
        ({"data": [{"path": str(rows)}], "stage": ["align"]}, "`stage` must be one of"),
        ({"data": [{"path": str(rows)}], "save_only_model": True}, "could not be resumed"),
        ({"data": [{"path": str(rows)}], "eval_strategy": "steps"}, "needs `eval_data`"),
        ({"data": [{"path": str(rows)}], "remove_unused_columns": True}, "must be false"),
        ({"data": [{"path": str(rows)}], "train_sampling_strategy": "group_by_length"}, "give `pack_to`"),
    ):
        assert main(["train", str(write(tmp_path, **keys))]) == 2
        assert message in capsys.readouterr().err, message
        assert not (tmp_path / "trained").exists()


def built_rows(count: int) -> list[dict]:
    return [{"id": str(i), "messages": []} for i in range(count)]


def test_sources_are_mixed(rows, tmp_path):
    """One after the other, at random some of them, or by ratio; rows built in Python beside those of files."""
    (tmp_path / "build.py").write_text(
        "def rows(count):\n    return [{'id': f'built {i}', 'messages': []} for i in range(count)]\n"
    )
    built = {"builder": f"{tmp_path / 'build.py'}:rows", "arguments": {"count": 6}}
    mixed = MixedDataset([{"path": str(rows), "rows": 10}, built], seed=3)
    names = [mixed[i]["id"] for i in range(len(mixed))]
    assert len(names) == 16 and names[10:] == [f"built {i}" for i in range(6)]
    assert len(set(names[:10])) == 10 and names[:10] != [str(i) for i in range(10)]
    again = MixedDataset([{"path": str(rows), "rows": 10}, built], seed=3)
    assert [again[i]["id"] for i in range(len(again))] == names

    module = {"builder": "modeling_tests.test_recipe:built_rows", "arguments": {"count": 3}}
    assert [MixedDataset([module])[i]["id"] for i in range(3)] == ["0", "1", "2"]

    datasets = pytest.importorskip("datasets")
    mixed = MixedDataset([{"path": str(rows), "ratio": 0.75}, {**built, "ratio": 0.25}], seed=0)
    names = [mixed[i]["id"] for i in range(len(mixed))]
    assert {str(i) for i in range(24)} | {f"built {i}" for i in range(6)} == set(names)
    assert 0.1 < sum("built" in name for name in names) / len(names) < 0.4
    saved = datasets.Dataset.from_list([{"id": "saved", "x": 1}])
    saved.save_to_disk(str(tmp_path / "saved"))
    assert MixedDataset([{"path": str(tmp_path / "saved")}])[0] == {"id": "saved", "x": 1}
    datasets.DatasetDict(test=saved).save_to_disk(str(tmp_path / "splits"))
    assert len(MixedDataset([{"path": str(tmp_path / "splits"), "split": "test"}])) == 1
    for source in ({"path": str(tmp_path / "saved"), "split": "test"}, {"path": str(tmp_path / "splits")}):
        with pytest.raises(ValueError, match="has the splits"):
            MixedDataset([source])


def test_rows_without_a_name_get_one(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": [], "id": null}\n\n{"messages": []}\n')
    mixed = MixedDataset([{"path": str(tmp_path / "rows.jsonl")}])
    assert [mixed[i]["id"] for i in range(2)] == [f"{tmp_path / 'rows.jsonl'}, row {i}" for i in range(2)]


def test_defaults_are_the_authors(rows, tmp_path):
    path = write(
        tmp_path, data=[{"path": str(rows)}], stage="align", learning_rate=None, per_device_train_batch_size=None
    )
    recipe, arguments = read_recipe(path)
    assert recipe.trainable == ["projector"] and recipe.max_length == 96
    assert (arguments.learning_rate, arguments.per_device_train_batch_size) == (1e-4, 32)
    assert (arguments.lr_scheduler_type, arguments.warmup_steps, arguments.weight_decay) == ("cosine", 0.03, 0.0)
    path.write_text(path.read_text() + "\nlearning_rate: 1e-5\n")  # which YAML takes for a string
    assert read_recipe(path)[1].learning_rate == 1e-5
