"""Pipelines and Auto classes: the host's own, with right answers, or a refusal that says why."""

import threading
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation import BaseStreamer

# Older releases hide this class behind torchvision, which it does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from longllava_hf import (
    TINY,
    LongLLaVAForCausalLM,
    LongLLaVAForConditionalGeneration,
    LongLLaVAImageProcessor,
    LongLLaVAInt8Config,
    LongLLaVATextModel,
)

from .conftest import published, small_config


EXAMPLES = Path(__file__).parent.parent / "examples"
THREE, SEVEN, FILM = (str(EXAMPLES / name) for name in ("three.png", "seven.png", "film.mp4"))
ANSWER = {"return_full_text": False, "max_new_tokens": 4}
TEXT = torch.tensor([[1, 20, 30, 40, 50]])


def chat(*files: str, question: str = "Which digit is this?") -> list[dict]:
    blocks = [{"type": "video" if file == FILM else "image", "path": file} for file in files]
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": question}]}]


CHATS = [chat(THREE), chat(SEVEN), chat(THREE, SEVEN, question="Which digit is the second picture?")]
FILM_CHAT = chat(FILM, question="Which digit appears in this film?")


def answers(outputs) -> list:
    return [answers(one) if isinstance(one, list) else one["generated_text"].strip() for one in outputs]


@pytest.fixture(scope="module", params=["image-text-to-text", "any-to-any"])
def pipe(request):
    """`any-to-any` asks for torchvision, of which nothing here is in use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)
        yield pipeline(request.param, model=TINY)


# Placeholders without pictures


def with_placeholders(count: int) -> torch.Tensor:
    return torch.tensor([[1, 20, *[5] * count, 30]])  # 5 is `image_token_id` of small models


@pytest.mark.parametrize("pixel_values", [None, torch.zeros(0, 3, 16, 16)])
def test_placeholders_need_pictures(small_model, pixel_values):
    match = r"There are 4 image tokens \(id 5\) in `input_ids`, but no pictures"
    for call in (small_model, small_model.model, small_model.generate, small_model.prefill):
        with pytest.raises(ValueError, match=match):
            call(with_placeholders(4), pixel_values=pixel_values)
    with pytest.raises(ValueError, match=match):  # whatever the chunks are that it is read in
        small_model.prefill(with_placeholders(4), prefill_chunk_size=2)
    with pytest.raises(ValueError, match="image tokens"):  # the last token, which `prefill` leaves to `generate`
        small_model.generate(torch.tensor([[1, 20, 5]]), max_new_tokens=2)


def test_placeholders_of_pictures_that_were_read(small_model):
    """A context that is repeated, encoded pictures, and embeddings with pictures in them, need no pixels."""
    ids, pixels = with_placeholders(4), torch.randn(1, 3, 16, 16)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = small_model.generate(ids, pixel_values=pixels, **greedy)
    context = small_model.prefill(ids[:, :-1], pixels)
    assert torch.equal(small_model.generate(ids, cache=context.branch(), **greedy), expected)
    encoded = {"image": small_model.get_image_features(pixels)}
    assert torch.equal(small_model.generate(ids, mm_encoder_outputs=encoded, **greedy), expected)
    assert torch.equal(small_model.generate(ids, pixel_values=pixels, use_cache=False, **greedy), expected)
    embeds = small_model.model.get_text_embeddings(ids)
    embeds[:, 2:6] = encoded["image"].pooler_output[0]
    logits = small_model(inputs_embeds=embeds).logits
    torch.testing.assert_close(logits, small_model(ids, pixel_values=pixels).logits)
    # New placeholders after a context that has pictures are new placeholders.
    with pytest.raises(ValueError, match="There are 4 image tokens"):
        small_model.generate(torch.cat([ids, ids], dim=1), cache=context.branch(), **greedy)
    assert context.num_tokens == 6


def test_a_text_pipeline_refuses_pictures():
    """Once dropped in silence: the answer was one to a placeholder."""
    pipe = pipeline("text-generation", model=TINY)
    assert pipe([{"role": "user", "content": "Hello"}], max_new_tokens=4)[0]["generated_text"][-1]["content"]
    with pytest.raises(ValueError, match="`image-text-to-text` takes pictures"):
        pipe(chat(THREE), max_new_tokens=4)


# The text part of a multimodal folder


@pytest.mark.parametrize("kind", ["native", "moe", "dense"])
@pytest.mark.parametrize("quantization", [None, "int8"])
@torch.no_grad()
def test_the_text_part_alone(tmp_path, kind, quantization):
    folder = TINY if kind == "native" else published(kind)
    config = None if quantization is None else LongLLaVAInt8Config()
    whole = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config).eval()
    expected = whole(TEXT).logits
    if quantization is not None:
        whole.save_pretrained(tmp_path / "quantized")
        folder = tmp_path / "quantized"
    text, info = LongLLaVAForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert torch.equal(text.eval()(TEXT).logits, expected)
    assert text.config.image_token_id == whole.config.image_token_id
    base = LongLLaVATextModel.from_pretrained(folder).eval()
    assert torch.equal(base(TEXT).last_hidden_state, whole.model(TEXT).last_hidden_state)
    for call in (text, text.generate, base):
        with pytest.raises(ValueError, match=f"There are 2 image tokens .id {text.config.image_token_id}"):
            call(torch.tensor([[1, *[text.config.image_token_id] * 2, 3]]))
    text.save_pretrained(tmp_path / "text")
    again = LongLLaVAForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert torch.equal(again(TEXT).logits, expected)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(again.generate(TEXT, **greedy), whole.generate(TEXT, **greedy))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "text")) is LongLLaVAForCausalLM


@torch.no_grad()
def test_the_text_part_with_a_tied_head(tmp_path):
    torch.manual_seed(0)
    whole = LongLLaVAForConditionalGeneration(small_config(tie_word_embeddings=True)).eval()
    whole.save_pretrained(tmp_path / "whole")
    text = LongLLaVAForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert text.lm_head.weight is text.model.embed_tokens.weight
    expected = whole.model(TEXT).last_hidden_state @ whole.model.language_model.embed_tokens.weight.T
    torch.testing.assert_close(text(TEXT).logits, expected)
    text.save_pretrained(tmp_path / "text")
    again = LongLLaVAForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert again.config.tie_word_embeddings and torch.equal(again(TEXT).logits, text(TEXT).logits)


def test_the_text_part_of_another_decoder(tmp_path):
    text = {"model_type": "qwen2", "vocab_size": 120, "num_hidden_layers": 2, "hidden_size": 32}
    small_config(text_config=text).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a `qwen2` and no `longllava_text`"):
        LongLLaVAForCausalLM.from_pretrained(tmp_path)


# Auto classes


@torch.no_grad()
def test_experts_implementation_in_one_word(monkeypatch):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    expected = AutoModelForImageTextToText.from_pretrained(TINY).eval()(TEXT).logits
    model = AutoModelForImageTextToText.from_pretrained(TINY, experts_implementation="grouped_mm").eval()
    calls, grouped_mm = [], ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", lambda *args: calls.append(1) or grouped_mm(*args))
    torch.testing.assert_close(model(TEXT).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 4  # expert layers
    assert model.get_experts_implementation()["text_config"] == "grouped_mm"


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_an_image_processor_for_a_folder_without_one(kind, processor):
    """The host looks for settings before it knows whose class it is: its Auto class has to be told the file."""
    wanted = LongLLaVAImageProcessor.from_pretrained(published(kind))
    loaded = AutoImageProcessor.from_pretrained(published(kind), image_processor_filename="config.json")
    assert type(loaded) is LongLLaVAImageProcessor
    assert loaded.to_dict() == wanted.to_dict() == processor.image_processor.to_dict()
    assert loaded.image_seq_length == 144 and loaded.crop_size.height == 336


@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}, {"dtype": torch.bfloat16}, {"device_map": "auto"}])
@pytest.mark.parametrize(
    "auto_class", ["AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM"]
)
def test_auto_classes(auto_class, options, tiny_processor):
    """All three give the whole model, also the one for text alone, as authors' users load it."""
    if (auto_class := getattr(transformers, auto_class, None)) is None:
        pytest.skip("this release of Transformers has no such class")
    model = auto_class.from_pretrained(TINY, **options)
    assert type(model) is LongLLaVAForConditionalGeneration
    assert model.dtype == options.get("dtype", torch.float32) or options.get("dtype") == "auto"
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for messages, answer in ((CHATS[2], "7"), (FILM_CHAT, "5")):
        inputs = tiny_processor.apply_chat_template(messages, **template).to(model.device, model.dtype)
        output = model.generate(**inputs, max_new_tokens=4)
        said = tiny_processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said.strip() == answer
    text = tiny_processor.apply_chat_template([{"role": "user", "content": "Hello"}], **template)
    assert model.generate(**text, max_new_tokens=4).shape[1] > text["input_ids"].shape[1]


def test_dtype_auto_is_that_of_the_checkpoint(tmp_path):
    AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(TINY).save_pretrained(tmp_path)
    for model in (AutoModelForImageTextToText, AutoModelForCausalLM, LongLLaVAForCausalLM):
        assert model.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    pipe = pipeline("image-text-to-text", model=str(tmp_path), dtype="auto")
    assert pipe.model.dtype == torch.bfloat16 and answers(pipe(text=CHATS[0], **ANSWER)) == ["3"]


# Pipelines


def test_chats(pipe):
    assert [answers(pipe(text=messages, **ANSWER)) for messages in CHATS] == [["3"], ["7"], ["7"]]
    assert answers(pipe(text=FILM_CHAT, **ANSWER)) == ["5"]
    assert answers(pipe(text=FILM_CHAT, processor_kwargs={"lazy": True, "num_frames": 64}, **ANSWER)) == ["5"]
    said = pipe(text=CHATS[0], max_new_tokens=4)[0]["generated_text"]
    assert [message["role"] for message in said] == ["user", "assistant"] and said[1]["content"].strip() == "3"
    system = {"role": "system", "content": "You read digits."}
    assert answers(pipe(text=[system, *CHATS[0]], **ANSWER)) == ["3"]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_lists_and_batches(pipe, batch_size):
    """Of different lengths and numbers of pictures, a film among them: padded, and with the answers of one alone."""
    chats = [*CHATS, FILM_CHAT]
    assert answers(pipe(text=chats, batch_size=batch_size, **ANSWER)) == [["3"], ["7"], ["7"], ["5"]]


def test_generators(pipe):
    prompts = [(THREE, "3"), (SEVEN, "7"), (THREE, "3")]
    prompt = "<image>\nWhich digit is this?\n"
    for batch_size in (1, 2):
        found = pipe(({"images": file, "text": prompt} for file, _ in prompts), batch_size=batch_size, **ANSWER)
        assert [answers(one) for one in found] == [[answer] for _, answer in prompts]
    chats = (messages for messages in [*CHATS, FILM_CHAT])
    if pipe.task == "any-to-any":
        pytest.skip("the host's any-to-any pipeline takes no generator of chats, whatever the model")
    assert [answers(one) for one in pipe(chats, batch_size=2, **ANSWER)] == [["3"], ["7"], ["7"], ["5"]]


def test_pictures_and_films_beside_the_text(pipe):
    prompt = "<image>\nWhich digit is this?\n"
    assert answers(pipe(images=THREE, text=prompt, **ANSWER)) == ["3"]
    assert answers(pipe(images=[[THREE], [SEVEN]], text=[prompt] * 2, **ANSWER)) == ["3", "7"]
    if pipe.task == "any-to-any":
        film = pipe(videos=FILM, text="<video>\nWhich digit appears in this film?\n", **ANSWER)
        assert answers(film) == ["5"]
        with pytest.raises(ValueError, match="no audio input"):
            pipe(audio="speech.wav", text="What is said?", **ANSWER)
    with pytest.raises(ValueError, match="number of `<image>` tokens"):
        pipe(images=THREE, text="Which digit is this?", **ANSWER)


@pytest.mark.parametrize(
    "options", [{"device_map": "auto"}, {"device_map": "cpu"}, {"dtype": "auto", "device_map": "auto"}]
)
def test_where_a_pipeline_runs(options):
    pipe = pipeline("image-text-to-text", model=TINY, **options)
    assert answers(pipe(text=[*CHATS, FILM_CHAT], batch_size=2, **ANSWER)) == [["3"], ["7"], ["7"], ["5"]]


# Streaming


class Generating(threading.Thread):
    """A call in a thread of its own, and what it raised."""

    def __init__(self, call):
        super().__init__()
        self.call, self.error = call, None
        self.start()

    def run(self):
        try:
            self.call()
        except BaseException as error:
            self.error = error


def streamer_of(processor) -> TextIteratorStreamer:
    return TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)


def test_a_pipeline_streams(pipe):
    streamer = streamer_of(pipe.processor)
    call = Generating(lambda: pipe(text=FILM_CHAT, generate_kwargs={"streamer": streamer}, **ANSWER))
    assert "".join(streamer).strip() == "5"
    call.join()
    assert call.error is None


@pytest.mark.parametrize("fault", ["gone", "damaged", "damaged later", "beams"])
def test_an_error_ends_a_stream(tiny_model, tiny_processor, tmp_path, fault):
    """Once a reader in another thread waited for ever."""
    files = [tmp_path / f"{i}.png" for i in range(tiny_model.config.vision_batch_size + 1)]
    for file in files:
        file.write_bytes(Path(THREE).read_bytes())
    inputs = tiny_processor.apply_chat_template(
        chat(*map(str, files)),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"lazy": True},
    )
    options, kinds, said = {}, OSError, str(files[0])
    if fault == "gone":
        files[0].unlink()
    elif fault == "damaged":
        files[0].write_bytes(b"\x89PNG and nothing else")
        kinds = (OSError, ValueError)
    elif fault == "damaged later":  # in the second batch of the tower
        files[-1].write_bytes(Path(THREE).read_bytes()[:60])
        kinds, said = (OSError, ValueError), str(files[-1])
    else:
        options, kinds, said = {"num_beams": 2}, ValueError, "streamer"
    streamer = streamer_of(tiny_processor)
    call = Generating(lambda: tiny_model.generate(**inputs, streamer=streamer, max_new_tokens=4, **options))
    assert "".join(streamer) == ""
    call.join()
    assert isinstance(call.error, kinds) and said in str(call.error)


def test_an_error_does_not_end_a_stream_of_another_kind(tiny_model):
    """Transformers' server puts the error into its own, which has to come before the end."""
    streamer, calls = BaseStreamer(), []
    streamer.put, streamer.end = (lambda _: None), (lambda: calls.append("end"))
    with pytest.raises(ValueError, match="image tokens"):
        tiny_model.generate(torch.tensor([[1, tiny_model.config.image_token_id, 2]]), streamer=streamer)
    assert not calls


# What a paged cache cannot hold


def test_continuous_batching_is_refused(tiny_model):
    """Once the answers came back empty, with the error in the log."""
    match = "no continuous batching: .*neither Mamba's states nor pictures"
    with pytest.raises(NotImplementedError, match=match):
        tiny_model.init_continuous_batching()
    with pytest.raises(NotImplementedError, match=match):
        tiny_model.generate_batch(inputs=[[1, 20, 30], [1, 40]])
    with pytest.raises(NotImplementedError, match=match):
        with tiny_model.continuous_batching_context_manager():
            pass
