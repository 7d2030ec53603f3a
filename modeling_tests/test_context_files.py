"""Kept contexts: damaged ones are refused, and those of anything that is not exactly what made them."""

import copy
import gc
import json
import multiprocessing
import random
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from longllava_hf import TINY, LongLLaVAContext, LongLLaVAForConditionalGeneration, LongLLaVAInt8Config
from longllava_hf import context_longllava as context_module
from longllava_hf.context_longllava import context_metadata
from longllava_hf.identity_longllava import (
    hash_image,
    hash_tensor,
    is_finite,
    model_fingerprint,
    processor_fingerprint,
)

from .conftest import small_config
from .test_context_longllava import prompt, states


@pytest.fixture
def kept(small_model, tiny_processor, tmp_path):
    """A file of a context; and a function that loads it."""
    file = tmp_path / "x.ctx"
    small_model.prefill(**prompt()).save(file, small_model, tiny_processor)
    return file, lambda: LongLLaVAContext.load(file, small_model, tiny_processor)


# Files


def test_metadata_is_kept_as_json_has_it(small_model, tmp_path):
    context = small_model.prefill(**prompt())
    context.metadata = {10: "ten", 2: ("a", "b")}
    context.save(tmp_path / "x.ctx", small_model)
    found = LongLLaVAContext.load(tmp_path / "x.ctx", small_model).metadata
    assert found == {"10": "ten", "2": ["a", "b"]}


def test_two_saves_have_the_same_bytes(small_model, tiny_processor, kept, tmp_path):
    file, load = kept
    load().save(tmp_path / "y.ctx", small_model, tiny_processor)
    assert (tmp_path / "y.ctx").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("metadata", [{"x": {1}}, {"x": "y" * (1 << 25)}])
def test_metadata_that_could_not_be_read_is_not_written(small_model, tmp_path, metadata):
    context = small_model.prefill(**prompt())
    context.metadata = metadata
    with pytest.raises(ValueError, match="`metadata`"):
        context.save(tmp_path / "x.ctx", small_model)
    assert not list(tmp_path.iterdir())


def test_every_flipped_bit_is_found(kept):
    file, load = kept
    whole, random_ = file.read_bytes(), random.Random(0)
    header = int.from_bytes(whole[:8], "little") + 8
    positions = [*range(0, 9), *random_.sample(range(9, header), 60), *random_.sample(range(header, len(whole)), 60)]
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << random_.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises((OSError, ValueError), match=r"x\.ctx`"):
            load()
    for length in random_.sample(range(len(whole)), 30):
        file.write_bytes(whole[:length])
        with pytest.raises((OSError, ValueError), match=r"x\.ctx`"):
            load()
    file.write_bytes(whole)
    load()


def rewrite(file, change, is_signed: bool) -> None:
    """Change tensors and what is said of them; with a checksum that is right again, if it is to be signed."""
    tensors, facts = load_file(file), context_metadata(file)
    change(tensors, facts)
    del facts["format"]
    if is_signed:
        facts["checksum"] = context_module._checksum(facts, tensors)
    save_file(tensors, file, metadata={"longllava_context": json.dumps(facts)})


def drop(name):
    return lambda tensors, facts: tensors.pop(name)


def edit(name, function):
    return lambda tensors, facts: tensors.update({name: function(tensors[name]).contiguous()})


def say(**facts_):
    return lambda tensors, facts: facts.update(facts_)


DAMAGE = {
    "no keys": drop("layers.4.keys"),
    "no state": drop("layers.0.recurrent_states.0"),
    "no convolution": drop("layers.3.conv_states.0"),
    "no ids": drop("input_ids"),
    "a layer too many": lambda tensors, facts: tensors.update({"layers.9.keys": tensors["layers.4.keys"].clone()}),
    "something else": lambda tensors, facts: tensors.update(x=torch.ones(1, 2)),
    "short keys": edit("layers.4.keys", lambda x: x[:, :, :-5]),
    "short both": lambda tensors, facts: [edit(f"layers.4.{n}", lambda x: x[:, :, :-5])(tensors, facts) for n in ("keys", "values")],
    "other heads": edit("layers.4.values", lambda x: x[:, :1]),
    "two rows": edit("layers.4.values", lambda x: x.repeat(2, 1, 1, 1)),
    "NaN": edit("layers.0.recurrent_states.0", lambda x: x.index_fill(1, torch.tensor([3]), float("nan"))),
    "infinite": edit("layers.4.keys", lambda x: x.index_fill(2, torch.tensor([3]), float("inf"))),
    "integers": edit("layers.4.keys", lambda x: x.to(torch.int32)),
    "another state": edit("layers.0.recurrent_states.0", lambda x: x[..., :-1]),
    "short ids": edit("input_ids", lambda x: x[:, :-1]),
    "ids of floats": edit("input_ids", lambda x: x.float()),
    "ids past the vocabulary": edit("input_ids", lambda x: x + 10**6),
    "negative ids": edit("input_ids", lambda x: x - 100),
    "a mask of twos": lambda tensors, facts: tensors.update(attention_mask=torch.full_like(tensors["input_ids"], 2)),
    "a short mask": lambda tensors, facts: tensors.update(attention_mask=torch.ones_like(tensors["input_ids"][:, 1:])),
    "fewer hashes": say(image_hashes=[["0"]]),
    "hashes of no kind": say(image_hashes="x"),
    "metadata of no kind": say(metadata=[]),
    "no model": say(model=None),
}  # fmt: skip


@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_contents_are_checked(kept, change, is_signed):
    file, load = kept
    rewrite(file, change, is_signed)
    with pytest.raises(OSError, match=r"The context `.*x\.ctx` is damaged"):
        load()


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b'{"a":' * 50_000, b"{}", b'{"__metadata__": 3}', b'{"x": 1}', b"{" + b"\xff" * 99]
)
def test_odd_headers(kept, header):
    file, load = kept
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises((OSError, ValueError), match=r"x\.ctx` is (damaged|not a context)"):
        load()


@pytest.mark.parametrize("value", ["[" * 100_000, "3", "{}", '{"version": []}', "null", '{"version": "3"}'])
def test_odd_facts(kept, value):
    file, load = kept
    save_file(load_file(file), file, metadata={"longllava_context": value})
    with pytest.raises((OSError, ValueError), match=r"x\.ctx`"):
        load()


def save_many(number, file, failures):
    model, context = save_many.shared
    for _ in range(60):
        try:
            context.save(file, model)
        except Exception as error:
            failures.put(f"{number}: {error!r}")


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_processes_that_save_one_context_at_once(small_model, tmp_path):
    context, file = small_model.prefill(**prompt()), tmp_path / "x.ctx"
    save_many.shared = small_model, context
    threads = torch.get_num_threads()
    gc.collect()
    torch.set_num_threads(1)  # threads do not live on in a fork
    try:
        fork = multiprocessing.get_context("fork")
        failures = fork.Queue()
        workers = [fork.Process(target=save_many, args=(number, file, failures)) for number in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(threads)
    assert [worker.exitcode for worker in workers] == [0] * 4 and failures.empty()
    LongLLaVAContext.load(file, small_model)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.ctx"]


# Whose they are


def test_a_hash_tells_every_single_value():
    torch.manual_seed(0)
    for size, dtype in (
        (3, torch.float32),
        (200_000, torch.float32),
        (999_983, torch.bfloat16),
        (1_100_001, torch.int8),
    ):
        tensor = torch.randn(size).mul(50).to(dtype)
        first, raw = hash_tensor(tensor), tensor.view(torch.uint8)
        assert hash_tensor(tensor.clone()) == first
        for position in [0, len(raw) - 1, *torch.randint(len(raw), (20,)).tolist()]:
            for bit in (1, 64):
                raw[position] ^= bit
                assert hash_tensor(tensor) != first, (size, position)
                raw[position] ^= bit
        assert hash_tensor(tensor) == first
        moved = tensor.clone()
        moved[: size // 2], moved[size // 2 : size // 2 * 2] = tensor[size // 2 : size // 2 * 2], tensor[: size // 2]
        assert hash_tensor(moved) != first
        assert hash_tensor(tensor[None]) != first
    assert hash_tensor(torch.arange(70_000.0).view(100, 700).T) == hash_tensor(
        torch.arange(70_000.0).view(100, 700).T.contiguous()
    )
    assert hash_tensor(torch.ones(300_001, dtype=torch.uint8)[1:]) == hash_tensor(
        torch.ones(300_000, dtype=torch.uint8)
    )
    for matrix in (torch.eye(512), torch.eye(1024, dtype=torch.bfloat16), torch.eye(2048)):
        first = hash_tensor(matrix)
        for order in ([1, 0], [300, 4], [2, 0, 1], [5, 7, 6]):
            other = matrix.clone()
            other[sorted(order)] = matrix[order]
            assert hash_tensor(other) != first
        assert hash_tensor(matrix.roll(1, 0)) != first != hash_tensor(matrix.flip(0))
    many = torch.zeros(600_001, dtype=torch.uint8)
    starts = {(start + many.data_ptr()) % 8: hash_tensor(many[start : start + 590_000]) for start in range(8)}
    assert len(starts) == 8 and len(set(starts.values())) == 1
    assert len(hash_tensor(torch.tensor(1.0))) == len(hash_tensor(torch.empty(0))) == 64


def test_any_value_of_any_weight_makes_another_model(small_model):
    """200 draws: one value changed by as little as there is, in place and without a trace."""
    expected, generator = model_fingerprint(small_model), torch.Generator().manual_seed(0)
    weights = list(small_model.state_dict(keep_vars=True).items())
    for draw in range(200):
        name, weight = weights[draw % len(weights)]
        raw = weight.data.view(-1).view(torch.uint8)
        position = int(torch.randint(len(raw), (1,), generator=generator))
        raw[position] ^= 1
        assert model_fingerprint(small_model) != expected, name
        raw[position] ^= 1
    assert model_fingerprint(small_model) == expected


def test_any_pixel_makes_another_picture():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        picture = torch.randn(3, 48, 48, generator=generator).to(dtype)
        expected = hash_image(picture)
        for _ in range(100):
            changed = picture.clone()
            changed.view(torch.uint8).view(-1)[int(torch.randint(picture.nbytes, (1,), generator=generator))] ^= 1
            assert hash_image(changed) != expected


@pytest.mark.parametrize("images", [15, 20, 50])
def test_one_other_picture_among_many(small_model, images):
    inputs = prompt(images, tail=2)
    context = small_model.prefill(**inputs)
    more = torch.cat([inputs["input_ids"], torch.tensor([[7]])], dim=1)
    small_model.generate(more, pixel_values=inputs["pixel_values"], cache=context.branch(), max_new_tokens=1)
    for number in range(images):
        other = inputs["pixel_values"].clone()
        other[number, 0, 0, 0] += 1e-3
        with pytest.raises(ValueError, match="but not its pictures"):
            small_model.generate(more, pixel_values=other, cache=context.branch(), max_new_tokens=1)


PIXEL_SETTINGS = {
    "do_normalize": False, "do_rescale": False, "do_resize": False, "do_center_crop": False, "do_pad": False,
    "do_convert_rgb": False, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.1, 0.2, 0.3], "rescale_factor": 0.5,
    "resample": 2, "size": {"shortest_edge": 50}, "crop_size": {"height": 47, "width": 48}, "image_seq_length": 5,
    "patch_strategy": "best_fit", "image_grid_pinpoints": [[1, 2]],
}  # fmt: skip


def test_any_setting_makes_another_processor(tiny_processor):
    expected = processor_fingerprint(tiny_processor)
    for name, value in PIXEL_SETTINGS.items():
        changed = copy.deepcopy(tiny_processor)
        setattr(changed.image_processor, name, value)
        assert processor_fingerprint(changed) != expected, name
    changes = {
        "template": lambda p: setattr(p, "chat_template", p.chat_template + " "),
        "frames": lambda p: setattr(p, "num_frames", 7),
        "padding": lambda p: setattr(p.tokenizer, "padding_side", "right"),
        "token": lambda p: p.tokenizer.add_tokens(["<new>"]),
        "special": lambda p: p.tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"}),
    }
    for name, change in changes.items():
        changed = copy.deepcopy(tiny_processor)
        change(changed)
        assert processor_fingerprint(changed) != expected, name
    same = copy.deepcopy(tiny_processor)
    same.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    same.image_processor.lazy = True
    assert processor_fingerprint(same) == expected


@pytest.mark.parametrize("quantization", [None, "int8", "bnb-int8", "nf4"])
def test_the_same_model_once_more(quantization, tmp_path):
    """Loaded again, saved and loaded, kept elsewhere: what it computes is the same."""
    if quantization not in (None, "int8"):
        pytest.importorskip("bitsandbytes")
    options = {
        "int8": LongLLaVAInt8Config,
        "bnb-int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "nf4": lambda: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    }

    def load(folder=TINY, **more):
        config = options[quantization]() if quantization and folder == TINY else None
        return LongLLaVAForConditionalGeneration.from_pretrained(folder, quantization_config=config, **more).eval()

    model = load()
    expected = model_fingerprint(model)
    assert model_fingerprint(load()) == expected
    model.save_pretrained(tmp_path)
    assert model_fingerprint(load(tmp_path)) == expected
    assert model_fingerprint(model.to("cpu")) == expected
    with torch.no_grad():  # the scales of quantised weights count too
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name.endswith(("weight_scale", "SCB", "absmax", "nested_absmax")):
                raw = tensor.data.view(-1).view(torch.uint8)
                raw[0] ^= 1
                assert model_fingerprint(model) != expected, name
                raw[0] ^= 1


def test_settings_in_another_order_are_the_same(small_model):
    expected = model_fingerprint(small_model)
    vision = small_model.config.vision_config
    vision.id2label = {1: "b", 0: "a"}
    first = model_fingerprint(small_model)
    vision.id2label = {0: "a", 1: "b"}
    assert model_fingerprint(small_model) == first
    small_model.config.vision_feature_layer = -1
    assert model_fingerprint(small_model) not in (first, expected)


def test_finite_numbers():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        large = torch.full((1 << 21,), torch.finfo(dtype).max, dtype=dtype)
        assert is_finite(large) and is_finite(-large) and is_finite(large[:0])
        for value in (float("nan"), float("inf"), -float("inf")):
            large[-5] = value
            assert not is_finite(large) and not is_finite(large[None, :, None])


def test_offloaded_models_have_the_same_contexts(small_model, tmp_path):
    import accelerate

    file, inputs = tmp_path / "x.ctx", prompt()
    small_model.prefill(**inputs).save(file, small_model)
    expected = LongLLaVAContext.load(file, small_model)
    for how in ("cpu", "disk"):
        offloaded = copy.deepcopy(small_model)
        if how == "cpu":
            accelerate.cpu_offload(offloaded, execution_device="cpu")
        else:
            accelerate.disk_offload(offloaded, str(tmp_path / "weights"), execution_device="cpu")
        assert any(parameter.is_meta for parameter in offloaded.parameters())
        context = LongLLaVAContext.load(file, offloaded)
        for one, other in zip(states(context), states(expected), strict=True):
            assert torch.equal(one, other)
        context.save(tmp_path / how, offloaded)
        assert (tmp_path / how).read_bytes() == file.read_bytes()


def test_adapters_make_other_models():
    peft = pytest.importorskip("peft")

    def adapted(seed=0, **settings):
        torch.manual_seed(0)
        model = LongLLaVAForConditionalGeneration(small_config()).eval()
        torch.manual_seed(seed)
        options = {"r": 2, "lora_alpha": 4, "init_lora_weights": False, **settings}
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj", "lm_head"], **options)).eval()

    model = adapted()
    bare, expected = model_fingerprint(model.unload()), model_fingerprint(adapted())
    assert model_fingerprint(LongLLaVAForConditionalGeneration.eval(model.unload())) == bare
    assert expected not in (bare, model_fingerprint(adapted(seed=1)), model_fingerprint(adapted(lora_alpha=5)))
    assert model_fingerprint(adapted()) == expected
    model = adapted()
    with model.disable_adapter():
        assert model_fingerprint(model) == bare
    model.add_adapter("other", peft.LoraConfig(target_modules=["in_proj"], init_lora_weights=False))
    assert model_fingerprint(model) == expected  # it is not at work
    model.set_adapter("other")
    assert model_fingerprint(model) not in (bare, expected)
    merged = adapted()
    merged.merge_adapter()
    assert model_fingerprint(merged) not in (bare, expected)
    assert model_fingerprint(merged) == model_fingerprint(adapted().merge_and_unload())


# Interruptions


class Interruption:
    """Ctrl-C at the n-th line of this package's own that is run."""

    FILES = ("context_longllava.py", "generation_longllava.py", "cache_longllava.py")

    def __init__(self, at: float):
        self.at, self.lines = at, 0

    def _trace(self, frame, event, argument):
        if not frame.f_code.co_filename.endswith(self.FILES):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self):
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


def as_whole(context) -> tuple:
    return context.input_ids.tolist(), context.image_hashes, context.metadata, [x.tolist() for x in states(context)]


@pytest.mark.parametrize("step", ["prefill", "generate", "beams", "crop", "reorder", "reset"])
def test_an_interruption_at_any_line_leaves_a_whole_context(step):
    torch.manual_seed(0)
    text = {"attn_layer_period": 1, "attn_layer_offset": 0} if step == "crop" else {}
    model = LongLLaVAForConditionalGeneration(small_config(text_config={"num_hidden_layers": 2, **text})).eval()
    first, second = prompt(1, tail=3), prompt(1, tail=4, seed=1)
    base = model.prefill(**first)
    base.metadata = {"files": ["x"]}
    steps = {
        "prefill": lambda context: model.prefill(**second, cache=context),
        "generate": lambda context: model.generate(**second, cache=context, max_new_tokens=3, do_sample=False),
        "beams": lambda context: model.generate(**second, cache=context, max_new_tokens=3, num_beams=2),
        "crop": lambda context: context.crop(-2),
        "reorder": lambda context: context.batch_repeat_interleave(2),
        "reset": lambda context: context.reset(),
    }
    before, whole = as_whole(base), base.branch()
    with Interruption(float("inf")) as run:
        steps[step](whole)
    if step == "reset":
        assert whole.input_ids is None and whole.num_tokens == 0
        after = None
    else:
        after = as_whole(whole)
    every = max(1, run.lines // 60)
    outcomes = set()
    for at in range(1, run.lines + 1, every):
        context = base.branch()
        with pytest.raises(KeyboardInterrupt), Interruption(at):
            steps[step](context)
        context.check_unchanged()
        found = None if context.input_ids is None else as_whole(context)
        assert found in (before, after), f"interrupted at line {at} of {run.lines}"
        outcomes.add(found == before)
    assert True in outcomes


def test_the_number_that_a_picture_is(small_model):
    inputs = prompt()
    for value in (np.nan, np.inf, -np.inf):
        wrong = inputs["pixel_values"].clone()
        wrong[1, 2, 3, 4] = value
        for call in (small_model.prefill, small_model.generate, small_model, small_model.model.get_image_features):
            arguments = {"pixel_values": wrong}
            if call != small_model.model.get_image_features:
                arguments["input_ids"] = inputs["input_ids"]
            with pytest.raises(
                ValueError, match=r"`pixel_values` must be finite, but those of images \[1\] \(of 3\) are not"
            ):
                call(**arguments)
