"""
LongLLaVA in vLLM against Transformers: the same prompts as token ids, the same greedy tokens, the same probabilities.
`scripts/vllm_environment.sh` makes an environment in which all of this runs on a CPU.
"""

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import longllava_hf
from longllava_hf import LongLLaVAConfig, LongLLaVAForConditionalGeneration
from longllava_hf.checkpoint_longllava import expected_shapes, has_vision_tower
from longllava_hf.convert import convert_checkpoint
from longllava_hf.serving.vllm_plugin import to_vllm_name

from .conftest import KINDS, free_port, golden, published


EXAMPLES = Path(longllava_hf.__file__).parents[2] / "examples"
NEW_TOKENS = 12
HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="the package vllm is not installed")


# Without vLLM: every weight has a place.


def stored_names(folder) -> list[str]:
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        return list(file.keys())


def native_names(folder) -> list[str]:
    with torch.device("meta"):
        return list(expected_shapes(LongLLaVAForConditionalGeneration(LongLLaVAConfig.from_pretrained(folder))))


@pytest.mark.parametrize("family", ["moe", "feed_forward"])
@pytest.mark.parametrize("kind", KINDS)
def test_published_names_are_those_of_a_native_checkpoint(kind, family):
    config = LongLLaVAConfig.from_pretrained(published(kind))
    stored = stored_names(published(kind))
    if family == "feed_forward":  # Jamba's names, where an only expert is a dense MLP
        dense = [i for i, experts in enumerate(config.text_config.layers_num_experts) if experts == 1]
        for i in dense:
            stored = [name.replace(f".{i}.moe.experts.0.", f".{i}.feed_forward.") for name in stored]
        stored = [name.replace(".moe.", ".feed_forward.").replace(".pre_moe_", ".pre_ff_") for name in stored]
    native = native_names(published(kind))
    found = [to_vllm_name(name, config) for name in stored]
    assert len(found) == len(set(found)) == len(native)
    assert set(found) == {to_vllm_name(name, config) for name in native}


def test_native_names():
    config = LongLLaVAConfig.from_pretrained(longllava_hf.TINY)
    stored = stored_names(longllava_hf.TINY)
    assert sorted(stored) == sorted(native_names(longllava_hf.TINY))
    found = {to_vllm_name(name, config) for name in stored}
    assert len(found) == len(stored)
    # All but the beginning is left to vLLM's Jamba, which knows Transformers' names.
    assert "language_model.model.layers.1.feed_forward.experts.3.up_proj.weight" in found
    assert "language_model.model.layers.4.self_attn.q_proj.weight" in found
    assert "language_model.lm_head.weight" in found
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(name.startswith(part) for name in found)


def test_a_name_without_a_place():
    config = LongLLaVAConfig.from_pretrained(longllava_hf.TINY)
    with pytest.raises(ValueError, match=r"model\.audio_tower\.weight.*expected one of"):
        to_vllm_name("model.audio_tower.weight", config)


def test_the_entry_point_imports_no_vllm():
    """It is imported by each process of vLLM, and by this test where there is none."""
    code = "import sys, longllava_hf.serving.vllm_plugin; print([name for name in sys.modules if name.startswith('vllm')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# With vLLM.


def picture(seed: int) -> Image.Image:
    """A digit, or noise of an odd size."""
    if seed % 3 < 2:
        return Image.open(EXAMPLES / ("three.png", "seven.png")[seed % 3]).convert("RGB")
    pixels = np.random.default_rng(seed).integers(0, 256, (40 + seed, 90 - seed, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def conversation(images: int, question: str, seed: int = 0) -> list[dict]:
    content = [{"type": "image", "image": picture(seed + i)} for i in range(images)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def with_pil(messages: list[dict]) -> list[dict]:
    """The same as vLLM wants pictures that are in memory."""

    def block(one: dict) -> dict:
        return {"type": "image_pil", "image_pil": one["image"]} if one["type"] == "image" else one

    return [
        {**message, "content": content if isinstance(content := message["content"], str) else [*map(block, content)]}
        for message in messages
    ]


def reference(model, inputs) -> tuple[list[int], list[int], list[float]]:
    """Prompt, greedy tokens, and their log probabilities, by Transformers."""
    length = inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs,
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[0, length:].tolist()
    scores = torch.stack(output.logits)[:, 0].log_softmax(-1)
    return inputs["input_ids"][0].tolist(), tokens, scores[range(len(tokens)), tokens].tolist()


@pytest.fixture(scope="module")
def expected(tiny_processor, tiny_model):
    def compute(messages: list[dict], **kwargs):
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return reference(tiny_model, tiny_processor.apply_chat_template(messages, **options, **kwargs))

    return compute


@pytest.fixture(scope="module", autouse=True)
def unbound_threads():
    """On a machine with one NUMA node, a CPU's workers have to share it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        yield


def start(model, **kwargs):
    from vllm import LLM

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "limit_mm_per_prompt": {"image": 8, "video": 1},
        "kv_cache_memory_bytes": 1 << 28,
    }
    return LLM(str(model), **{**defaults, **kwargs})


@pytest.fixture(scope="module")
def llm():
    """Small chunks: a prompt is read in several, beside other requests that generate."""
    return start(longllava_hf.TINY, max_num_batched_tokens=48)


def sampling():
    from vllm import SamplingParams

    return SamplingParams(temperature=0, min_tokens=NEW_TOKENS, max_tokens=NEW_TOKENS, logprobs=1)


def assert_same(output, wanted) -> None:
    prompt, tokens, scores = wanted
    completion = output.outputs[0]
    assert list(output.prompt_token_ids) == prompt
    assert list(completion.token_ids) == tokens
    found = [step[token].logprob for step, token in zip(completion.logprobs, tokens)]
    np.testing.assert_allclose(found, scores, atol=1e-4)


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("images", [0, 1, 8])
def test_greedy_tokens(llm, expected, images):
    messages = conversation(images, "Which digit is the last picture?")
    (output,) = llm.chat(with_pil(messages), sampling(), use_tqdm=False)
    assert output.prompt_token_ids.count(1) == 2  # the turn's and the answer's, and no other
    assert_same(output, expected(messages))


@needs_vllm
@pytest.mark.slow
def test_sixteen_requests_at_once(llm, expected):
    questions = ["Which digit is this?", "Which digit is the second picture?", "Hello"]
    several = [conversation(i % 9, questions[i % 3], seed=i) for i in range(16)]
    outputs = llm.chat([with_pil(one) for one in several], sampling(), use_tqdm=False)
    for output, messages in zip(outputs, several):
        assert_same(output, expected(messages))


@needs_vllm
@pytest.mark.slow
def test_a_conversation_with_pictures_between_its_texts(llm, expected):
    first, second = {"type": "image", "image": picture(0)}, {"type": "image", "image": picture(1)}
    messages = [
        {"role": "system", "content": "Answer with one digit."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "This:"}, first, {"type": "text", "text": "or"}, second],
        },
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}, second]},
    ]
    (output,) = llm.chat(with_pil(messages), sampling(), use_tqdm=False)
    assert_same(output, expected(messages))


@needs_vllm
@pytest.mark.slow
def test_a_film(llm, expected, tiny_processor):
    frames = np.random.default_rng(0).integers(0, 256, (20, 50, 60, 3), dtype=np.uint8)
    frames[7] = np.asarray(picture(1).resize((60, 50)))
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "Which digit appears in this film?"}]
    messages = [{"role": "user", "content": content}]
    text = tiny_processor.apply_chat_template(messages, add_generation_prompt=True)
    ids = tiny_processor.tokenizer.encode(text, add_special_tokens=False)
    prompt = {"prompt_token_ids": ids, "multi_modal_data": {"video": [frames]}}
    (output,) = llm.generate([prompt], sampling(), use_tqdm=False)
    assert_same(output, expected(messages))


@needs_vllm
@pytest.mark.slow
def test_sub_images(llm, expected):
    """What a call sets holds for that call: pictures become grids of tiles."""
    messages = conversation(3, "Which digit is this?", seed=2)
    options = {"patch_strategy": "best_fit", "image_grid_pinpoints": [[1, 2], [2, 1], [2, 2]]}
    (output,) = llm.chat(with_pil(messages), sampling(), use_tqdm=False, mm_processor_kwargs=options)
    assert_same(output, expected(messages, processor_kwargs=options))
    (output,) = llm.chat(with_pil(messages), sampling(), use_tqdm=False)
    assert_same(output, expected(messages))


@needs_vllm
@pytest.mark.slow
def test_what_does_not_fit_is_refused(llm, tiny_processor):
    image = {"multi_modal_data": {"image": [picture(0)]}}
    with pytest.raises(ValueError, match="The prompt has 2 `<image>`, but 1 images were given"):
        llm.generate([{"prompt": "<image> <image>", **image}], use_tqdm=False)
    ids = [*tiny_processor.tokenizer.encode("<image>"), *tiny_processor.tokenizer.encode("digit"), 1]
    split = [tiny_processor.tokenizer.convert_tokens_to_ids(letter) for letter in "which"]
    with pytest.raises(ValueError, match="token ids must be those that the tokenizer makes of its text"):
        llm.generate([{"prompt_token_ids": ids + split, **image}], use_tqdm=False)


@needs_vllm
@pytest.mark.slow
def test_questions_about_the_same_pictures(llm, expected):
    """What was read of them is found again, or read again, by vLLM's prefix caching, which is on by default."""
    for question in ("Which digit is the first picture?", "Which digit is the second picture?") * 2:
        messages = conversation(8, question, seed=40)
        (output,) = llm.chat(with_pil(messages), sampling(), use_tqdm=False)
        assert_same(output, expected(messages))


@needs_vllm
@pytest.mark.gpu
def test_int8_experts(tiny_processor):
    """vLLM's own, which has no kernel for a CPU."""
    llm = start(longllava_hf.TINY, quantization="int8_per_channel_weight_only", dtype="bfloat16")
    (output,) = llm.chat(with_pil(conversation(1, "Which digit is this?")), use_tqdm=False)
    assert output.outputs[0].text == "3"


@needs_vllm
@pytest.mark.slow
def test_published_layout_on_two_workers(expected, tmp_path):
    """Tensor parallel, a prompt in chunks of 16, and the authors' layout, the tower beside it."""
    folder = convert_checkpoint(longllava_hf.TINY, str(tmp_path / "published"), to="published")
    several = [conversation(i, "Which digit is the second picture?", seed=i) for i in (0, 1, 3, 8)]
    llm = start(folder, tensor_parallel_size=2, max_num_batched_tokens=16, max_num_seqs=4)
    outputs = llm.chat([with_pil(one) for one in several], sampling(), use_tqdm=False)
    for output, messages in zip(outputs, several):
        assert_same(output, expected(messages))


@needs_vllm
@pytest.mark.slow
def test_dense_and_without_a_tower_of_its_own(published_copy):
    """LongLLaVA-9B's layout; the authors' greedy tokens, as far as Transformers gives them."""
    folder = published_copy("dense")
    weights = load_file(folder / "model.safetensors")
    save_file({name: x for name, x in weights.items() if not has_vision_tower([name])}, folder / "model.safetensors")
    model = LongLLaVAForConditionalGeneration.from_pretrained(folder).eval()
    ids = torch.from_numpy(golden("dense")["text_ids"]).reshape(1, -1)
    wanted = reference(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    (output,) = start(folder).generate([{"prompt_token_ids": ids[0].tolist()}], sampling(), use_tqdm=False)
    assert_same(output, wanted)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    port = free_port()
    log = tmp_path_factory.mktemp("vllm") / "log"
    options = {
        "--port": port,
        "--host": "127.0.0.1",
        "--dtype": "float32",
        "--max-model-len": 1024,
        "--max-num-seqs": 8,
        "--served-model-name": "tiny",
        "--kv-cache-memory-bytes": 1 << 28,
        "--limit-mm-per-prompt": json.dumps({"image": 8, "video": 1}),
        "--media-io-kwargs": json.dumps({"video": {"num_frames": 64}}),
    }
    command = [Path(sys.executable).with_name("vllm"), "serve", longllava_hf.TINY, "--enforce-eager"]
    command += [str(word) for option in options.items() for word in option]
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(f"The server did not start: {log.read_text()[-4000:]}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@needs_vllm
@pytest.mark.slow
def test_the_server_with_the_client_of_openai(server, tiny_model, tiny_processor):
    openai = pytest.importorskip("openai", reason="the package openai is not installed")
    client = openai.OpenAI(base_url=server, api_key="none")

    def ask(content, **kwargs):
        messages = [{"role": "user", "content": content}]
        return client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=8, **kwargs)

    urls = [{"type": "image_url", "image_url": {"url": data_url(picture(i))}} for i in (0, 1)]
    question = "Which digit is the second picture?"
    completion = ask([*urls, {"type": "text", "text": question}])
    assert completion.choices[0].message.content == "7"
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    inputs = tiny_processor.apply_chat_template(conversation(2, question), **options)
    assert completion.usage.prompt_tokens == len(inputs["input_ids"][0])  # so there is no second BOS

    stream = ask([urls[0], {"type": "text", "text": "Which digit is this?"}], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "3"

    film = base64.b64encode((EXAMPLES / "film.mp4").read_bytes()).decode()
    block = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{film}"}}
    completion = ask([block, {"type": "text", "text": "Which digit appears in this film?"}])
    assert completion.choices[0].message.content == "5"

    with pytest.raises(openai.BadRequestError, match="The prompt has 2 `<image>`, but 1 images were given"):
        ask([urls[0], {"type": "text", "text": "Is this an <image>?"}])
    assert ask("Hello").usage.completion_tokens > 0  # the server goes on
