"""`longllava verify`: what is whole, and what is wrong with what is not."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from longllava_hf import TINY, LongLLaVAForConditionalGeneration, LongLLaVAInt8Config, cli
from longllava_hf.verify import verify

from .test_context_longllava import prompt


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(TINY, folder)
    (folder / "model.safetensors").unlink()
    LongLLaVAForConditionalGeneration.from_pretrained(TINY).save_pretrained(folder, max_shard_size="2MB")
    return folder


def edit(file, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_whole_checkpoint(published_copy, sharded, tmp_path):
    for folder in (TINY, published_copy(), published_copy("dense"), sharded):
        report = verify(folder)
        assert report["problems"] == [] and report["tensors"] > 100
    quantized = LongLLaVAForConditionalGeneration.from_pretrained(TINY, quantization_config=LongLLaVAInt8Config())
    quantized.save_pretrained(tmp_path / "int8")
    assert verify(tmp_path / "int8")["problems"] == []


def test_values_that_are_not_finite(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    name = next(name for name, tensor in load_file(file).items() if tensor.ndim == 2)
    edit(file, lambda tensors: tensors[name].view(-1)[3:5].fill_(float("nan")))
    assert verify(sharded)["problems"] == [
        f"The weight `{name}` has 2 values that are not finite, of {load_file(file)[name].numel()}."
    ]


def test_weights_and_files_that_are_missing_or_damaged(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    whole = second.read_bytes()
    name = next(iter(load_file(first)))
    edit(first, lambda tensors: tensors.pop(name))
    problems = " ".join(verify(sharded)["problems"])
    assert (
        "1 missing" in problems and f"promises 1 weights in `{first}` that are not there, such as `{name}`" in problems
    )
    second.write_bytes(whole[:1000])
    assert second.name in " ".join(verify(sharded)["problems"])
    second.unlink()
    assert second.name in " ".join(verify(sharded)["problems"])


def test_a_weight_in_another_shard_than_the_index_says(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    moved = load_file(first)[name]
    edit(first, lambda tensors: tensors.pop(name))
    edit(second, lambda tensors: tensors.update({name: moved}))
    problems = " ".join(verify(sharded)["problems"])
    assert f"such as `{name}`" in problems and second.name in problems


def test_hashes_of_the_hubs_cache(tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "main", tmp_path / "models--x" / "blobs"
    shutil.copytree(TINY, snapshot)
    blobs.mkdir()
    file = snapshot / "model.safetensors"
    blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
    file.rename(blob)
    file.symlink_to(os.path.relpath(blob, snapshot))
    report = verify(snapshot)
    assert report["problems"] == [] and report["hashes"] == 1
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    (problem,) = verify(snapshot)["problems"]
    assert "SHA-256" in problem and blob.name in problem


def test_an_image_token_that_is_another(tmp_path):
    shutil.copytree(TINY, tmp_path / "x")
    file = tmp_path / "x" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_token_id": 7}))
    (problem,) = verify(tmp_path / "x")["problems"]
    assert "image token of the configuration is 7, and that of the processor 4" in problem


def test_a_context(small_model, tmp_path):
    file = tmp_path / "x.ctx"
    small_model.prefill(**prompt()).save(file, small_model)
    assert verify(file) == {"kind": "context", "rows": 1, "tokens": 48, "images": 3, "problems": []}
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (problem,) = verify(file)["problems"]
    assert "x.ctx` is damaged or truncated: its checksum is another" in problem


def test_on_the_command_line(sharded, tmp_path, capsys):
    assert cli.main(["verify", str(sharded)]) == 0
    assert capsys.readouterr().out.endswith("whole\n")
    next(sharded.glob("*00002*.safetensors")).write_bytes(b"")
    assert cli.main(["verify", str(sharded)]) == 2
    assert "00002" in capsys.readouterr().err
    assert cli.main(["verify", str(sharded), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["problems"]
    (tmp_path / "x.txt").write_text("x")
    for path, reason in (("x.txt", "neither a kept context nor the folder"), ("none", "No such file")):
        assert cli.main(["verify", str(tmp_path / path)]) == 2
        assert reason in capsys.readouterr().err


def test_infinite_sums_of_finite_weights(tmp_path):
    """A sum in the weights' own dtype may overflow where no weight does."""
    shutil.copytree(TINY, tmp_path / "x")
    model = LongLLaVAForConditionalGeneration.from_pretrained(TINY, dtype=torch.float16)
    with torch.no_grad():
        model.lm_head.weight.fill_(60_000)
    model.save_pretrained(tmp_path / "x")
    assert verify(tmp_path / "x")["problems"] == []
