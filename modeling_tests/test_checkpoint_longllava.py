"""Loading and converting: both families of names, and everything that can be wrong with a checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, GenerationConfig

from longllava_hf import (
    LongLLaVAForCausalLM,
    LongLLaVAForConditionalGeneration,
    LongLLaVAInt8Config,
    LongLLaVATextModel,
)
from longllava_hf import convert as convert_module
from longllava_hf.checkpoint_longllava import expected_shapes, published_names, to_native_name, to_published_name
from longllava_hf.configuration_longllava import locate_vision_tower
from longllava_hf.convert import convert_checkpoint

from .conftest import KINDS, published


load = AutoModelForImageTextToText.from_pretrained


def edit(folder, change):
    """Rewrite a checkpoint's weights after `change` has had its way with them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def in_shards(folder, count=3):
    tensors = load_file(folder / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for i in range(count):
        shard = f"model-{i + 1:05}-of-{count:05}.safetensors"
        save_file({n: tensors[n] for n in names[i::count]}, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names[i::count], shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def on_meta(config):
    with torch.device("meta"):
        return LongLLaVAForConditionalGeneration(config)


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_names_there_and_back(kind):
    config = LongLLaVAForConditionalGeneration.config_class.from_pretrained(published(kind))
    names = published_names(config)
    on_disk = load_file(published(kind) / "model.safetensors")
    native = {name: to_native_name(name, names) for name in on_disk}
    assert {n: tuple(on_disk[p].shape) for p, n in native.items()} == expected_shapes(on_meta(config))
    assert all(to_published_name(n, config) == p for p, n in native.items())
    assert all(to_native_name(n, names) == n for n in native.values())


def test_shards(published_copy):
    folder = published_copy()
    expected = load(folder)
    in_shards(folder)
    assert same_weights(load(folder), expected)


def test_save_writes_the_native_layout(tmp_path):
    load(published("moe")).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    model = LongLLaVAForConditionalGeneration.from_pretrained(tmp_path)
    assert names == set(expected_shapes(model))
    assert "model.language_model.layers.1.feed_forward.experts.3.up_proj.weight" in names


def test_tower_from_where_the_configuration_says(published_copy):
    folder = published_copy()
    expected = load(folder)

    def drop_tower(tensors):
        for name in [n for n in tensors if "vision_tower" in n]:
            del tensors[name]

    edit(folder, drop_tower)
    assert same_weights(load(folder), expected)
    # The same from .bin files.
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert same_weights(load(folder), expected)


def test_what_is_beside_the_weights_is_read_too(published_copy):
    """Also where Transformers is given tensors in place of a name."""
    folder = published_copy()
    edit(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "vision_tower" in n])
    GenerationConfig(max_new_tokens=7, temperature=0.5, do_sample=True).save_pretrained(folder)
    for options in ({}, {"quantization_config": LongLLaVAInt8Config()}):
        model = load(folder, **options)
        assert model.generation_config.max_new_tokens == 7
        assert model.name_or_path == model.config.name_or_path == str(folder)
        assert load(folder, generation_config=GenerationConfig(top_k=3), **options).generation_config.top_k == 3


def test_names_of_the_callers_own(published_copy):
    folder = published_copy()
    expected = load(folder)
    edit(folder, lambda tensors: tensors.update({"head": tensors.pop("lm_head.weight")}))
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
        load(folder)
    assert same_weights(load(folder, key_mapping={"^head$": "lm_head.weight"}), expected)


def test_what_the_caller_hands_over_is_left_as_it_is(published_copy):
    folder = published_copy()
    config = load(folder).config
    before = config.to_dict()
    for options in ({}, {"quantization_config": LongLLaVAInt8Config()}):
        load(folder, config=config, dtype=torch.bfloat16, **options)
        assert config.to_dict() == before
        with pytest.raises(ValueError, match="state_dict"):  # one or the other, and never in silence
            load(folder, state_dict={}, **options)


def test_overrides_of_the_configuration(published_copy):
    folder = published_copy()
    model = load(folder, vision_batch_size=3, dtype=torch.bfloat16)
    assert model.config.vision_batch_size == 3 and model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"missing: .*multi_modal_projector\.linear_1\.bias"):
        edit(folder, lambda tensors: tensors.pop("model.mm_projector.0.bias"))
        load(folder, dtype="auto")


def test_a_tower_brings_no_code(published_copy, monkeypatch):
    """A folder that asks to run a file of its own is read as what it says it is, and nobody is asked."""
    folder = published_copy()
    tower = folder.parent / "clip-tiny-336"
    config = json.loads((tower / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    (tower / "config.json").write_text(json.dumps(config))
    (tower / "evil.py").write_text("raise SystemExit('the code of a tower was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "vision_tower" in name])
    assert same_weights(load(folder), load(published("moe")))


def test_another_folder_of_the_towers_name_changes_nothing(published_copy, tmp_path, monkeypatch):
    folder = published_copy()
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "vision_tower" in name])
    decoy = tmp_path / "work" / "clip-tiny-336"
    shutil.copytree(folder.parent / "clip-tiny-336", decoy)
    edit(decoy, lambda tensors: [tensor.add_(1) for tensor in tensors.values() if tensor.is_floating_point()])
    monkeypatch.chdir(decoy.parent)
    assert same_weights(load(folder), load(published("moe")))


def test_a_tower_of_another_shape_is_an_error(published_copy):
    folder = published_copy()
    edit(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "vision_tower" in n])
    tower = folder.parent / "clip-tiny-336"
    weights = load_file(tower / "model.safetensors")
    weights.pop("vision_model.encoder.layers.1.mlp.fc1.weight")
    save_file(weights, tower / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*layers\.1\.mlp\.fc1\.weight"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lm_head.weight", r"lm_head\.weight"),
        ("model.layers.0.mamba.A_log", r"language_model\.layers\.0\.mamba\.A_log"),
        ("model.layers.2.moe.experts.0.up_proj.weight", r"layers\.2\.feed_forward\.up_proj\.weight"),
        ("model.layers.1.moe.experts.2.up_proj.weight", r"layers\.1\.feed_forward\.experts\.2\.up_proj\.weight"),
        ("model.layers.3.moe.router.weight", r"layers\.3\.feed_forward\.router\.weight"),
        ("model.mm_projector.2.bias", r"multi_modal_projector\.linear_2\.bias"),
    ],
)
def test_a_missing_weight_is_named(published_copy, name, said):
    folder = published_copy()
    edit(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"1 missing: \S*{said}"):
        load(folder)
    with pytest.raises(ValueError, match=rf"1 missing: \S*{said}"):
        convert_checkpoint(str(folder), str(folder.parent / "converted"))
    assert not (folder.parent / "converted").exists() and not (folder.parent / "converted.partial").exists()


@pytest.mark.parametrize(
    "name", ["model.layers.0.mamba.A_log", "model.embed_tokens.weight", "model.layers.1.moe.experts.2.up_proj.weight"]
)
def test_a_misshapen_weight_is_named(published_copy, name):
    folder = published_copy()
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    native = "experts" if "experts" in name else name.removeprefix("model.").removesuffix(".weight")
    with pytest.raises(ValueError, match=native.replace(".", r"\.")):
        load(folder)
    with pytest.raises(ValueError, match=r"1 of another shape: .*\(3, 5\) in the checkpoint but"):
        convert_checkpoint(str(folder), str(folder.parent / "converted"))


def test_unexpected_weights_are_reported(published_copy):
    folder = published_copy()
    edit(folder, lambda tensors: tensors.update({"model.image_newline": torch.zeros(64)}))
    _, info = load(folder, output_loading_info=True)
    assert {n.removeprefix("model.") for n in info["unexpected_keys"]} == {"image_newline"}


def test_a_folder_without_weights(published_copy):
    folder = published_copy()
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(folder)
    with pytest.raises(OSError, match=r"has no weights.*model\.safetensors"):
        convert_checkpoint(str(folder), str(folder.parent / "converted"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_damaged_file_is_named(published_copy, damage, sharded):
    folder = published_copy()
    if sharded:
        in_shards(folder)
    file = folder / ("model-00002-of-00003.safetensors" if sharded else "model.safetensors")
    content = file.read_bytes()
    file.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "garbage": b"x" * 1000}[damage])
    with pytest.raises(OSError, match=rf"damaged.*{file.name}"):
        load(folder)
    with pytest.raises(OSError, match=rf"damaged.*{file.name}"):
        convert_checkpoint(str(folder), str(folder.parent / "converted"))


def test_a_shard_that_is_not_there(published_copy):
    folder = published_copy()
    in_shards(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(OSError, match=r"model-00002-of-00003\.safetensors"):
        load(folder)
    with pytest.raises(OSError, match=r"model-00002-of-00003\.safetensors"):
        convert_checkpoint(str(folder), str(folder.parent / "converted"))


def test_no_pickle_is_run(published_copy):
    class Harmful:
        def __reduce__(self):
            return (os.system, ("true",))

    folder = published_copy()
    tensors = load_file(folder / "model.safetensors")
    torch.save({**tensors, "evil": Harmful()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="damaged"):
        load(folder)
    with pytest.raises(OSError, match="damaged"):
        convert_checkpoint(str(folder), str(folder.parent / "converted"))


@pytest.mark.parametrize("kind", KINDS)
def test_converting_there_and_back_changes_no_value(published_copy, kind):
    folder = published_copy(kind)
    in_shards(folder)
    native = convert_checkpoint(str(folder), str(folder.parent / "native"))
    back = convert_checkpoint(str(native), str(folder.parent / "back"), to="published")
    original = {}
    for file in folder.glob("*.safetensors"):
        original.update(load_file(file))
    returned = {}
    for file in back.glob("*.safetensors"):
        returned.update(load_file(file))
    assert original.keys() == returned.keys()
    assert all(torch.equal(original[name], returned[name]) for name in original)
    assert len(list(native.glob("*.safetensors"))) == 3
    assert same_weights(load(native), load(back))


def test_an_interrupted_conversion_goes_on(published_copy, monkeypatch):
    folder, target = published_copy(), None
    in_shards(folder)
    target = folder.parent / "converted"
    saved = []

    def save_two(tensors, path, **kwargs):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(convert_module, "save_file", save_two)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(str(folder), str(target))
    assert not target.exists()
    partial = folder.parent / "converted.partial"
    kept = {file: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    assert len(kept) == 2

    with pytest.raises(ValueError, match="left from another conversion"):
        convert_checkpoint(str(folder), str(target), to="published")
    monkeypatch.setattr(convert_module, "save_file", save_file)
    convert_checkpoint(str(folder), str(target))
    assert not partial.exists() and same_weights(load(target), load(folder))
    moved = {file.name: file.stat().st_mtime_ns for file in target.glob("*.safetensors")}
    assert all(moved[file.name] == time for file, time in kept.items())


def stopped_conversion(folder, target, shards=2):
    """A conversion that breaks off after so many shards. Returns the folder it leaves."""
    saved = []

    def save_some(tensors, path, **kwargs):
        if len(saved) == shards:
            raise KeyboardInterrupt
        saved.append(path)
        save_file(tensors, path, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_module, "save_file", save_some)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(str(folder), str(target))
    return target.with_name(target.name + ".partial")


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("file", ["model-00003-of-00003.safetensors", "config.json"])
def test_a_conversion_of_another_source_is_not_gone_on_with(published_copy, file):
    """Of the same names and sizes."""
    folder = published_copy()
    in_shards(folder)
    partial = stopped_conversion(folder, folder.parent / "converted")
    before, original = contents(partial), (folder / file).read_bytes()
    if file == "config.json":
        (folder / file).write_text(json.dumps(json.loads(original), indent=1))
    else:
        save_file({name: x + 1 for name, x in load_file(folder / file).items()}, folder / file, {"format": "pt"})
        assert (folder / file).stat().st_size == len(original)
    with pytest.raises(ValueError, match=rf"left from another conversion: its {file} was"):
        convert_checkpoint(str(folder), str(folder.parent / "converted"))
    assert contents(partial) == before
    (folder / file).write_bytes(original)
    convert_checkpoint(str(folder), str(folder.parent / "converted"))
    assert same_weights(load(folder.parent / "converted"), load(folder))


def test_another_tower_is_another_source(published_copy):
    folder = published_copy()
    edit(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "vision_tower" in n])
    stopped_conversion(folder, folder.parent / "converted", shards=1)
    edit(
        folder.parent / "clip-tiny-336", lambda tensors: [x.add_(1) for x in tensors.values() if x.is_floating_point()]
    )
    with pytest.raises(ValueError, match=r"another conversion: its vision_tower/model\.safetensors"):
        convert_checkpoint(str(folder), str(folder.parent / "converted"))


@pytest.mark.parametrize("damage", ["empty", "changed", "removed"])
def test_a_finished_shard_that_is_damaged_is_made_anew(published_copy, damage):
    folder = published_copy()
    in_shards(folder)
    convert_checkpoint(str(folder), str(folder.parent / "converted"))
    expected = contents(folder.parent / "converted")
    shutil.rmtree(folder.parent / "converted")
    shard = stopped_conversion(folder, folder.parent / "converted") / "model-00001-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes({"empty": b"", "changed": content[:-1] + b"x", "removed": b""}[damage])
    if damage == "removed":
        shard.unlink()
    for left in (
        ".tmpAbCdEf",
        "special_tokens_map.json",
    ):  # of a process that was killed, or not in the source any more
        (shard.parent / left).write_text("left")
    convert_checkpoint(str(folder), str(folder.parent / "converted"))
    assert contents(folder.parent / "converted") == expected


def test_no_damaged_shard_is_published(published_copy, monkeypatch):
    folder = published_copy()
    in_shards(folder)
    write_settings = convert_module.write_settings

    def damage(source, partial, *args, **kwargs):
        write_settings(source, partial, *args, **kwargs)
        os.truncate(partial / "model-00002-of-00003.safetensors", 0)

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "write_settings", damage)
        with pytest.raises(OSError, match=r"not what was written: .*model-00002-of-00003\.safetensors"):
            convert_checkpoint(str(folder), str(folder.parent / "converted"))
    assert not (folder.parent / "converted").exists()
    convert_checkpoint(str(folder), str(folder.parent / "converted"))
    assert same_weights(load(folder.parent / "converted"), load(folder))


def test_weights_of_an_earlier_state_are_not_brought_along(published_copy):
    """Least of all over a shard of the same name."""
    folder = published_copy()
    expected = load(folder)
    for name in ("model-00001-of-00002.safetensors", "model-00001-of-00004.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(b"earlier")
    edit(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "vision_tower" in n])
    native = convert_checkpoint(str(folder), str(folder.parent / "native"))
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert {file.name for file in native.iterdir() if file.suffix in (".safetensors", ".bin")} == shards
    assert same_weights(load(native), expected)


def test_a_second_conversion_at_once_is_refused(published_copy, monkeypatch):
    folder, refused = published_copy(), []

    def save(*args, **kwargs):
        with pytest.raises(OSError, match=r"Another conversion to .*converted. is at work") as error:
            convert_checkpoint(str(folder), str(folder.parent / "converted"))
        refused.append(error)
        save_file(*args, **kwargs)

    monkeypatch.setattr(convert_module, "save_file", save)
    convert_checkpoint(str(folder), str(folder.parent / "converted"))
    assert refused and same_weights(load(folder.parent / "converted"), load(folder))
    assert {oct(file.stat().st_mode & 0o777) for file in (folder.parent / "converted").iterdir()} == {"0o644"}


def test_a_folder_of_no_conversion_is_left_alone(published_copy):
    folder = published_copy()
    partial = folder.parent / "converted.partial"
    partial.mkdir()
    (partial / "letter").write_text("mine")
    with pytest.raises(ValueError, match=r"of no conversion: .*'letter'"):
        convert_checkpoint(str(folder), str(folder.parent / "converted"))
    (partial / "conversion.json").write_text("[")
    with pytest.raises(OSError, match=r"conversion\.json. is damaged"):
        convert_checkpoint(str(folder), str(folder.parent / "converted"))
    assert (partial / "letter").read_text() == "mine"


def test_source_and_destination_inside_each_other(published_copy):
    folder = published_copy()
    (folder.parent / "link").symlink_to("checkpoint")
    inside = folder.parent / "outer.partial" / "source"
    shutil.copytree(folder, inside)
    before = contents(folder.parent)
    for source, target in [(folder, folder / "sub"), (folder, folder.parent / "link" / "sub" / "sub"),
                           (folder.parent / "link", folder / "sub"), (inside, folder.parent / "outer")]:  # fmt: skip
        with pytest.raises(OSError, match="must not be inside each other"):
            convert_checkpoint(str(source), str(target))
    assert contents(folder.parent) == before
    (folder.parent / "dangling").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="dangling"):
        convert_checkpoint(str(folder), str(folder.parent / "dangling"))


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "config.json", "notes.txt", "templates"])
def test_links_out_of_the_source(published_copy, name):
    folder = published_copy()
    in_shards(folder)
    (folder / "notes.txt").write_text("notes")
    if name == "templates":
        name = "additional_chat_templates/x.jinja"
        (folder / name).parent.mkdir()
        (folder / name).write_text("x")
    elsewhere = folder.parent / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(OSError, match=rf"{name}. leads to .*elsewhere"):
        convert_checkpoint(str(folder), str(folder.parent / "converted"))
    (folder / name).unlink()
    (folder / "inside").mkdir()
    elsewhere.rename(folder / "inside" / "file")
    (folder / name).symlink_to(folder / "inside" / "file")
    convert_checkpoint(str(folder), str(folder.parent / "converted"))
    assert not any(file.is_symlink() for file in (folder.parent / "converted").rglob("*"))


def hub_cache(folder, root):
    """What downloading a checkpoint leaves in `root`. Returns the snapshot."""
    snapshot = root / "models--someone--llava" / "snapshots" / ("0" * 40)
    for place in (snapshot, root / "models--someone--llava" / "blobs", root / "models--someone--llava" / "refs"):
        place.mkdir(parents=True)
    (root / "models--someone--llava" / "refs" / "main").write_text("0" * 40)
    for i, file in enumerate(folder.iterdir()):
        shutil.copyfile(file, root / "models--someone--llava" / "blobs" / f"{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    return snapshot


def test_a_hub_cache_may_have_its_links(published_copy, tmp_path):
    folder = published_copy()
    in_shards(folder)
    native = convert_checkpoint(str(folder), str(tmp_path / "native"))  # which has no tower beside it
    snapshot = hub_cache(native, tmp_path / "hub")
    convert_checkpoint(str(snapshot), str(tmp_path / "converted"), to="published")
    assert same_weights(load(tmp_path / "converted"), load(folder))
    (snapshot / "notes.txt").symlink_to("/etc/hostname")
    with pytest.raises(OSError, match=r"notes\.txt. leads to ./etc/hostname"):
        convert_checkpoint(str(snapshot), str(tmp_path / "again"))


FILES_ELSEWHERE = ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "C:x.safetensors",
                   "x\0.safetensors", "..", ".", "", 3, None, ["x"]]  # fmt: skip


@pytest.mark.parametrize("file", FILES_ELSEWHERE)
def test_an_index_that_leads_elsewhere(published_copy, file, tmp_path):
    folder = published_copy()
    in_shards(folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = file
    index.write_text(json.dumps(content))
    for name, options in (
        (folder, {}),
        ("someone/llava", {"cache_dir": hub_cache(folder, tmp_path / "hub").parents[2]}),
    ):
        with pytest.raises(OSError, match=r"index\.json. has .lm_head\.weight. in .*where the name of a file"):
            load(name, **options)
    with pytest.raises(OSError, match=r"index\.json. has .lm_head\.weight. in .*where the name of a file"):
        convert_checkpoint(str(folder), str(tmp_path / "converted"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"weight_map": ' + '{"x":' * 100_000, "no JSON"),
        (b"\xff\xfe", "no JSON"),
        ("[1]", "found list"),
        ("null", "found NoneType"),
        ('{"metadata": {}}', "`weight_map` is NoneType"),
        ('{"weight_map": {"a": "b"}}', "`metadata` is NoneType"),
        ('{"metadata": {}, "weight_map": ["model.safetensors"]}', "`weight_map` is list"),
        ('{"metadata": {}, "weight_map": {}}', "names no file"),
    ],
)
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_that_is_damaged(published_copy, content, said, kind):
    folder = published_copy()
    (folder / "model.safetensors").unlink()
    (folder / f"{kind}.index.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OSError, match=rf"{kind}\.index\.json. is damaged: .*{said}"):
        load(folder)
    with pytest.raises(OSError, match=rf"{kind}\.index\.json. is damaged: .*{said}"):
        convert_checkpoint(str(folder), str(folder.parent / "converted"))


def test_the_index_of_a_tower_elsewhere_is_looked_at_too(published_copy):
    folder = published_copy()
    edit(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "vision_tower" in n])
    in_shards(folder.parent / "clip-tiny-336")
    index = folder.parent / "clip-tiny-336" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of", "../model-00001-of"))
    with pytest.raises(OSError, match=r"clip-tiny-336/model\.safetensors\.index\.json. has"):
        load(folder)
    with pytest.raises(OSError, match=r"clip-tiny-336/model\.safetensors\.index\.json. has"):
        convert_checkpoint(str(folder), str(folder.parent / "converted"))


def test_conversion_does_not_overwrite(published_copy):
    folder = published_copy()
    with pytest.raises(FileExistsError, match="exists already"):
        convert_checkpoint(str(folder), str(folder.parent))
    with pytest.raises(ValueError, match="'ggml'"):
        convert_checkpoint(str(folder), str(folder.parent / "x"), to="ggml")


def test_conversion_brings_the_tower_along(published_copy):
    folder = published_copy()
    expected = load(folder)
    edit(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "vision_tower" in n])
    native = convert_checkpoint(str(folder), str(folder.parent / "native"))
    back = convert_checkpoint(str(native), str(folder.parent / "back"), to="published")
    shutil.rmtree(folder.parent / "clip-tiny-336")
    assert same_weights(load(native), expected) and same_weights(load(back), expected)


@pytest.mark.slow
def test_conversion_holds_one_shard_in_memory(tmp_path):
    """40 shards of 8 MB are rewritten with far less than their 320 MB."""
    script = f"""
import json, resource, torch
from safetensors.torch import save_file
from longllava_hf import LongLLaVAConfig, LongLLaVAForConditionalGeneration
from longllava_hf.checkpoint_longllava import expected_shapes
from longllava_hf.convert import convert_checkpoint
from modeling_tests.conftest import small_config
config = small_config(text_config=dict(hidden_size=512, intermediate_size=2048, vocab_size=2000, num_experts=8))
config.save_pretrained({str(tmp_path / "source")!r})
with torch.device("meta"):
    shapes = expected_shapes(LongLLaVAForConditionalGeneration(config))
names, weight_map, total = sorted(shapes), {{}}, 0
for i in range(40):
    shard = f"model-{{i}}.safetensors"
    tensors = {{n: torch.zeros(shapes[n]) for n in names[i::40]}}
    total += sum(t.nbytes for t in tensors.values())
    save_file(tensors, {str(tmp_path / "source")!r} + "/" + shard, metadata=dict(format="pt"))
    weight_map.update({{n: shard for n in tensors}})
json.dump(dict(metadata=dict(), weight_map=weight_map), open({str(tmp_path / "source")!r} + "/model.safetensors.index.json", "w"))
del tensors
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_checkpoint({str(tmp_path / "source")!r}, {str(tmp_path / "native")!r})
print(total, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    total, grown = map(int, result.stdout.split()[-2:])
    assert total > 300e6 and grown < 0.25 * total, (total, grown)


def test_a_damaged_file_of_pytorch_is_named_too(published_copy):
    folder = published_copy()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=r"damaged.*pytorch_model\.bin"):
        load(folder)
    with pytest.raises(OSError, match=r"damaged.*pytorch_model\.bin"):
        convert_checkpoint(str(folder), str(folder.parent / "converted"))


def test_a_damaged_adapter_is_named(published_copy):
    peft = pytest.importorskip("peft")
    folder = published_copy()
    model = peft.get_peft_model(load(folder), peft.LoraConfig(target_modules=["q_proj"], r=2))
    alone = folder.parent / "adapter"
    for adapter in (alone, folder):  # by itself, and beside the weights it is for
        model.save_pretrained(adapter)
        os.truncate(adapter / "adapter_model.safetensors", 300)
        with pytest.raises(OSError, match=r"damaged.*adapter_model\.safetensors"):
            load(adapter)


def test_a_damaged_tower_elsewhere_is_named(published_copy):
    folder = published_copy()
    tensors = load_file(folder / "model.safetensors")
    save_file({name: x for name, x in tensors.items() if "vision_tower" not in name}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    tower = folder.parent / "tower"
    shutil.copytree(locate_vision_tower(config["mm_vision_tower"], folder), tower, copy_function=shutil.copyfile)
    (folder / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "../tower"}))
    load(folder)
    os.truncate(tower / "model.safetensors", 1000)
    with pytest.raises(OSError, match=r"damaged.*tower/model\.safetensors"):
        load(folder)
    with pytest.raises(OSError, match=r"damaged.*tower/model\.safetensors"):
        convert_checkpoint(str(folder), str(folder.parent / "converted"))


def test_too_little_memory_is_no_damage(published_copy, monkeypatch):
    def load_state_dict(*args, **kwargs):
        raise MemoryError("no 40 GB")

    folder = published_copy()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("longllava_hf.checkpoint_longllava.load_state_dict", load_state_dict)
    with pytest.raises(MemoryError, match="no 40 GB"):
        load(folder)


def test_a_base_model_of_a_quantized_checkpoint(tmp_path):
    """Experts are stacked there, and the base model's names have no `model.` in front."""
    from .test_modeling_longllava_text import small_text_config

    LongLLaVAForCausalLM(small_text_config()).save_pretrained(tmp_path / "plain")
    config = LongLLaVAInt8Config()
    whole = LongLLaVAForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    whole.save_pretrained(tmp_path / "quantized")
    assert same_weights(LongLLaVATextModel.from_pretrained(tmp_path / "quantized"), whole.model)


def test_text_model_names(tmp_path):
    """The text model alone reads its own files and the base model's."""
    from .test_modeling_longllava_text import small_text_config

    model = LongLLaVAForCausalLM(small_text_config())
    model.save_pretrained(tmp_path / "whole")
    assert "model.layers.1.feed_forward.experts.0.gate_proj.weight" in load_file(
        tmp_path / "whole" / "model.safetensors"
    )
    base = type(model.model).from_pretrained(tmp_path / "whole")
    assert same_weights(base, model.model)
    base.save_pretrained(tmp_path / "base")
    assert same_weights(type(model.model).from_pretrained(tmp_path / "base"), base)
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
        LongLLaVAForCausalLM.from_pretrained(tmp_path / "base")
