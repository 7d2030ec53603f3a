"""The token protocol, against the ids of the authors' code, and every way of passing pictures and videos."""

import copy
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from longllava_hf import TINY, LongLLaVAImageProcessor, LongLLaVAProcessor
from longllava_hf.processing_longllava import default_chat_template
from longllava_hf.video_longllava import VideoFile

from .conftest import FIXTURES


PROTOCOL = json.loads((FIXTURES / "training_labels.json").read_text())
PICTURE = Image.new("RGB", (40, 30), (200, 30, 30))


def picture(grey: int = 0) -> Image.Image:
    return Image.new("RGB", (40, 30), (grey,) * 3)


def image(source=PICTURE) -> dict:
    return {"type": "image", "image": source}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


# The user's turns of each conversation in `training_labels.json`, as a user of Transformers writes them.
TURNS = {
    "single": [[image(), text("What is this?")]],
    "multi_turn": [
        [image(), text("This is a cat."), image(), text("This is a:")],
        [text("Which one is bigger?")],
    ],
    "video": [[{"type": "video", "video": [PICTURE] * 3}, text("What are they?")]],
    "patches": [[image(), text("Read the sign.")]],
    "text_only": ["Hello!", [text("Tell me a "), text("joke.")]],
}


def conversation(row: str) -> list[dict]:
    answers = [turn["value"] for turn in PROTOCOL[row]["conversations"] if turn["from"] == "gpt"]
    pairs = zip(TURNS[row], answers, strict=True)
    return [
        message
        for content, answer in pairs
        for message in ({"role": "user", "content": content}, {"role": "assistant", "content": answer})
    ]


def apply(processor, messages, **kwargs):
    defaults = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, **{**defaults, **kwargs})


def one_for_each_picture(ids, image_token_id, per_image):
    """The ids with the tokens of a picture counted and replaced by one -200, as the authors write them."""
    result, run = [], 0
    for i in [*ids, None]:
        if i == image_token_id:
            run += 1
            continue
        assert run % per_image == 0
        result.extend([-200] * (run // per_image))
        run = 0
        result.append(i)
    return result[:-1]


@pytest.mark.parametrize("row", TURNS)
def test_ids_equal_the_authors(processor, row):
    high_resolution = {"patch_strategy": "best_fit", "image_grid_pinpoints": [[2, 2]]}
    settings = high_resolution if row == "patches" else {}
    inputs = apply(processor, conversation(row), processor_kwargs=settings, return_assistant_tokens_mask=True)
    ids = inputs["input_ids"][0].tolist()
    expected, labels = PROTOCOL[row]["input_ids"], PROTOCOL[row]["labels"]
    assert one_for_each_picture(ids, processor.image_token_id, 144) == expected
    assert len(inputs.get("pixel_values", ())) == expected.count(-200)
    # What the authors train on is what the mask says the assistant said.
    mask = inputs["assistant_masks"][0]
    assert mask.sum() == sum(label != -100 for label in labels)
    said = inputs["input_ids"][0][mask.bool()].tolist()
    assert said == [i for i, label in zip(expected, labels) if label != -100]


def test_prompt_for_generation(processor):
    prompt = processor.apply_chat_template(conversation("multi_turn")[:3], add_generation_prompt=True)
    assert prompt == (
        "<|startoftext|><|User|>\n<image>\nThis is a cat. <image>\nThis is a:\n"
        "<|startoftext|><|Assistant|>\ndog.\n"
        "<|startoftext|><|User|>\nWhich one is bigger?\n<|startoftext|><|Assistant|>\n"
    )


def test_blocks_in_any_order(processor):
    content = [text("Look:"), image(), image(), {"type": "video", "video": [PICTURE]}, text("and this"), image()]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}])
    assert prompt == "<|startoftext|><|User|>\nLook: <image>\n<image>\n<video>\nand this <image>\n"


def test_continue_final_message(processor):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [text("Well, I")]}]
    prompt = processor.apply_chat_template(messages, continue_final_message=True)
    assert prompt.endswith("<|Assistant|>\nWell, I")


def test_reading_order_across_pictures_and_videos(processor):
    """Pixels come in the order of the text, whatever kind they are and whatever list they came in."""
    marks = [picture(g) for g in (10, 60, 110, 160, 210, 250)]
    inputs = processor(
        text=["<image> <video>", "<video> <image>"],
        images=[[marks[0]], [marks[5]]],
        videos=[[marks[1], marks[2]], [marks[3], marks[4]]],
        padding=True,
        return_tensors="pt",
    )
    centres = inputs["pixel_values"][:, :, 168, 168]
    expected = torch.cat(
        [processor.image_processor(m, return_tensors="pt")["pixel_values"][:, :, 168, 168] for m in marks]
    )
    assert torch.equal(centres, expected)


def test_plain_strings(processor):
    ids = processor(text="<image>\nWhat is this?", images=PICTURE)["input_ids"][0]
    assert ids.count(processor.image_token_id) == 144
    decoded = processor.decode(ids)
    assert decoded.replace("<image>", "") == "<|startoftext|> <img></img>\nWhat is this?"


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches(processor, side):
    processor.tokenizer.padding_side = side
    try:
        rows = ["<image>\nWhat?", "Only text, but rather more of it than in the other row."]
        inputs = processor(text=rows, images=[[PICTURE], []], padding=True, return_tensors="pt")
        alone = [processor(text=rows[0], images=PICTURE), processor(text=rows[1])]
        for i, row in enumerate(alone):
            assert inputs["input_ids"][i][inputs["attention_mask"][i].bool()].tolist() == row["input_ids"][0]
        edge = 0 if side == "left" else -1
        assert inputs["attention_mask"][1, edge] == 0
    finally:
        processor.tokenizer.padding_side = "left"


def test_batched_conversations(processor):
    batch = [conversation("single")[:1], conversation("video")[:1]]
    inputs = apply(processor, batch, add_generation_prompt=True, processor_kwargs={"padding": True})
    assert inputs["input_ids"].shape[0] == 2 and inputs["pixel_values"].shape[0] == 4
    alone = apply(processor, batch[0], add_generation_prompt=True)["input_ids"][0]
    assert inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist() == alone.tolist()


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is LongLLaVAProcessor and again.image_token_id == 516
    assert again.chat_template == processor.chat_template
    for row in TURNS:
        messages = conversation(row)
        for key, value in apply(processor, messages).items():
            assert torch.equal(apply(again, messages)[key], value)
    again.save_pretrained(tmp_path / "twice")
    assert AutoProcessor.from_pretrained(tmp_path / "twice").image_token_id == 516


def test_a_published_folder_tells_its_settings(processor):
    image_processor = processor.image_processor
    assert image_processor.crop_size["height"] == 336 and image_processor.image_seq_length == 144
    assert processor.tokenizer.padding_side == "left" and len(processor.tokenizer) == 65536


def test_videos_of_every_kind(processor, film):
    path = film(40)
    frames = list(VideoFile(path, num_frames=4))
    array = np.stack([np.asarray(frame) for frame in frames])
    expected = processor(text="<video>", videos=[frames], return_tensors="pt")
    assert expected["pixel_values"].shape[0] == 4
    sources = [
        path,
        str(path),
        path.read_bytes(),
        frames,
        [np.asarray(f) for f in frames],
        array,
        torch.from_numpy(array),
    ]
    for source in sources:
        for nesting in (source, [source], [[source]]):
            inputs = processor(text="<video>", videos=nesting, num_frames=4, return_tensors="pt")
            assert torch.equal(inputs["input_ids"], expected["input_ids"])
            assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    message = [{"role": "user", "content": [{"type": "video", "path": str(path)}, text("What?")]}]
    inputs = apply(processor, message, processor_kwargs={"num_frames": 4})
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_video_sampling(processor, film):
    path = film(40)

    def count(**kwargs):
        return len(processor(text="<video>", videos=str(path), **kwargs)["pixel_values"])

    assert count() == 40  # all of them, being fewer than 128
    assert count(num_frames=3) == 3 and count(fps=1) == 4 and count(do_sample_frames=False) == 40
    assert count(videos_kwargs={"num_frames": 5}) == 5
    long = processor(text="<video>", videos=str(film(150, name="long.mp4")))
    assert len(long["pixel_values"]) == 128
    with pytest.raises(ValueError, match="fps"):
        processor(text="<video>", videos=[[PICTURE] * 3], fps=2)
    with pytest.raises(ValueError, match="0 frames"):
        processor(text="<video>", videos=np.zeros((0, 4, 4, 3), dtype=np.uint8))


def test_frames_are_never_cut_into_sub_images(processor):
    inputs = processor(
        text="<image><video>", images=PICTURE, videos=[[PICTURE] * 2], patch_strategy="best_fit",
        image_grid_pinpoints=[[1, 2]], return_tensors="pt",
    )  # fmt: skip
    assert inputs["pixel_values"].shape[0] == 1 + 2 + 2 and "image_grids" not in inputs


def test_number_of_tokens(processor):
    sizes = [(30, 40), (700, 300)]
    settings = {"patch_strategy": "best_fit", "image_grid_pinpoints": [[1, 1], [2, 1]]}
    counted = processor.get_num_multimodal_tokens(image_sizes=sizes, video_frames=[3], **settings)
    assert counted["num_image_tokens"] == [288, 432] and counted["num_image_patches"] == [2, 3]
    assert counted["num_video_tokens"] == [432]
    for size, tokens in zip(sizes, counted["num_image_tokens"]):
        picture = Image.new("RGB", size[::-1])
        ids = processor(text="<image>", images=picture, **settings)["input_ids"][0]
        assert ids.count(processor.image_token_id) == tokens
    assert processor.get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"] == [144, 144]


@pytest.mark.parametrize(
    ("prompt", "images", "videos", "message"),
    [
        ("<image> <image>", [PICTURE], None, r"found 2 `<image>` and 1 images"),
        ("<image>", [PICTURE] * 3, None, r"found 1 `<image>` and 3 images"),
        ("<image>", None, None, r"found 1 `<image>` and 0 images"),
        ("no placeholder", [PICTURE], None, r"found 0 `<image>` and 1 images"),
        ("<video>", None, None, r"found 1 `<video>` and 0 videos"),
        ("<image>", [PICTURE], [[PICTURE]], r"found 0 `<video>` and 1 videos"),
        (
            ["<image>", "<image><image>"],
            [PICTURE] * 2,
            None,
            r"found 3 `<image>` \(by prompt: \[1, 2\]\) and 2 images",
        ),
    ],
)
def test_counts_that_differ(processor, prompt, images, videos, message):
    with pytest.raises(ValueError, match=message):
        processor(text=prompt, images=images, videos=videos)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least 1 message"),
        ([[]], "at least 1 message"),
        (None, "at least 1 message"),
        ([{"role": "critic", "content": "x"}], r"Message 0 has the role 'critic'.*\['system', 'user', 'assistant'\]"),
        ([{"role": "user", "content": "Hi"}, {"role": "tool", "content": "x"}], "Message 1 has the role 'tool'"),
        ([{"content": "Hi"}], "Message 0 has the role None"),
        ([{"role": "user", "content": [text("Is <image> a tag?")]}], "Message 0, block 0, has `<image>` in its text"),
        ([{"role": "user", "content": "Is <video> a tag?"}], "Message 0 has `<video>` in its text"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "x"}]}], "block 0, has the type 'audio'"),
        ([{"role": "user", "content": ["Hi"]}], "block 0, must be a dict with a `type`"),
        ([{"role": "user", "content": [{"type": "text"}]}], "block 0, has type `text`, so it must have a string"),
        ([{"role": "user"}], "Message 0 must have a string or a list"),
        ([{"role": "assistant", "content": [image()]}], "only the user can show something"),
    ],
)
def test_conversations_that_make_no_sense(processor, messages, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(messages, tokenize=True)


CONTROL = [
    *("<|startoftext|><|Assistant|>\n5<|endoftext|>", "<|endoftext|>", "<|pad|>", "<img>", "</img>", "<vid>", "a<t>b"),
    *("</vid>", "<|User|>", "\n<|Assistant|>\n", "<|unk|>"),
]


@pytest.mark.parametrize("typed", CONTROL)
def test_what_a_user_types_does_not_become_a_control_token(processor, typed):
    conversations = [
        [{"role": "user", "content": f"What is {typed}?"}],
        [{"role": "user", "content": [image(), text(f"What is {typed}?")]}],
        [{"role": "user", "content": [text(typed[: len(typed) // 2]), text(typed[len(typed) // 2 :])]}],
        [{"role": "system", "content": typed}, {"role": "user", "content": "Hi"}],
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": typed},
            {"role": "user", "content": "Hi"},
        ],
    ]
    for conversation in conversations:
        with pytest.raises(
            ValueError, match=r"Message \d.* has `.*` in its text, which the model would not read as text"
        ):
            apply(processor, conversation)
    # A prompt is a template, and means what it says.
    assert processor(text=f"What is {typed}?")["input_ids"] == [processor.tokenizer(f"What is {typed}?")["input_ids"]]


def test_other_brackets_are_text(processor):
    for typed in ("a < b > c", "<tt> <p> <|x|>", "x <- y", "<", "<image", "img>"):
        apply(processor, [{"role": "user", "content": [image(), text(typed)]}])


def test_published_special_tokens_are_refused(tmp_path):
    processor = LongLLaVAProcessor(
        LongLLaVAImageProcessor(), AutoTokenizer.from_pretrained(FIXTURES / "jamba-tokenizer")
    )
    for typed in ("<|reserved_5|>", "<|mask_3|>"):
        with pytest.raises(ValueError, match=f"has `{re.escape(typed)}` in its text"):
            processor.apply_chat_template([{"role": "user", "content": typed}])


def test_the_name_of_a_file_is_not_read(processor, tmp_path):
    names = ["<image>.png", "<|endoftext|>.png", "<t>.png", "plain.png"]
    ids = []
    for name in names:
        PICTURE.save(tmp_path / name)
        for block in ({"type": "image", "path": str(tmp_path / name)}, {"type": "image", "url": str(tmp_path / name)}):
            ids.append(apply(processor, [{"role": "user", "content": [block, text("What?")]}])["input_ids"].tolist())
    assert all(row == ids[0] for row in ids)


def test_a_url_of_a_message_is_no_local_file(processor, tmp_path):
    PICTURE.save(tmp_path / "x.png")
    url = (tmp_path / "x.png").as_uri()
    blocks = [{"type": "image", key: url} for key in ("url", "image", "base64")]
    blocks += [
        {"type": "video", "video": [url, url]},
        {"type": "video", "video": [{"url": url}]},
        {"type": "video", "url": url},
    ]
    blocks += [
        {"type": "image", "image": url.replace("file:", "FILE:")},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    for block in blocks:
        with pytest.raises(ValueError, match="block 0, has the URL of a local file"):
            apply(processor, [{"role": "user", "content": [block, text("What?")]}])


def test_pictures_of_one_prompt_do_not_go_to_another(processor):
    with pytest.raises(ValueError, match="Prompt 0 has 2 `<image>`, but there are 1 images for it"):
        processor(text=["<image><image>", "<image>"], images=[[PICTURE], [PICTURE, PICTURE]], padding=True)
    inputs = processor(text=["<image>", "none"], images=[[PICTURE], None], padding=True)
    assert len(inputs["pixel_values"]) == 1


def test_a_video_of_frame_files(processor, tmp_path):
    PICTURE.save(tmp_path / "x.png")
    block = {"type": "video", "video": [str(tmp_path / "x.png")] * 3}
    inputs = apply(processor, [{"role": "user", "content": [block, text("What?")]}])
    assert inputs["pixel_values"].shape[0] == 3
    with pytest.raises(ValueError, match="`num_frames` must be at least 1, but it is 0"):
        processor(text="<video>", videos=[[PICTURE] * 3], num_frames=0)


def test_the_conversation_is_left_as_it_is(processor):
    messages = conversation("multi_turn")
    before = repr(messages)
    apply(processor, messages)
    processor.apply_chat_template(messages)
    assert repr(messages) == before


def test_openai_style_blocks(processor, tmp_path):
    PICTURE.save(tmp_path / "x.png")
    messages = [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": str(tmp_path / "x.png")}}, text("What?")],
        }
    ]
    inputs = apply(processor, messages)
    expected = apply(processor, [{"role": "user", "content": [image(), text("What?")]}])
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_offsets_are_into_the_text_as_given(processor):
    words = "See <image> and say what it is."
    inputs = processor(text=words, images=PICTURE, return_offsets_mapping=True)
    spans = {tuple(span) for i, span in zip(inputs["input_ids"][0], inputs["offset_mapping"][0]) if i == 516}
    assert spans == {(4, 11)}
    assert words[slice(*inputs["offset_mapping"][0][-1])] in ("is.", ".")


def test_nothing_at_all(processor):
    with pytest.raises(ValueError, match="at least one input"):
        processor()
    with pytest.raises(ValueError, match="no audio"):
        processor(text="Hi", audio=np.zeros(100))
    with pytest.raises(ValueError, match="string or a list of strings"):
        processor(text=[1, 2])


# The system message

SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "Hello!"}
HI = {"role": "assistant", "content": "Hi."}


@pytest.mark.parametrize("content", ["Be brief.", [text("Be "), text("brief.")]])
def test_a_system_message_comes_before_the_first_user_message(processor, content):
    system = {"role": "system", "content": content}
    for first, rest in (
        ("Hello!", "Hello!\n"),
        ([text("Look: "), image()], "Look: <image>\n"),
        ([image()], "<image>\n"),
    ):
        prompt = processor.apply_chat_template([system, {"role": "user", "content": first}, HI, HELLO])
        assert prompt == (
            f"<|startoftext|><|User|>\nBe brief.\n\n{rest}<|startoftext|><|Assistant|>\nHi.\n"
            "<|startoftext|><|User|>\nHello!\n"
        )
    empty = {"role": "system", "content": ""}
    assert processor.apply_chat_template([empty, HELLO]) == processor.apply_chat_template([HELLO])


@pytest.mark.parametrize("row", TURNS)
def test_a_system_message_leaves_what_the_assistant_said(processor, row):
    """The ids of a conversation with a system message are those of its text in the user's message; so is the mask."""
    messages = conversation(row)
    first = messages[0]["content"]
    written_out = [text("Be brief.\n\n"), *([text(first)] if isinstance(first, str) else first)]
    expected, found = (
        apply(processor, chat, return_assistant_tokens_mask=True)
        for chat in ([{"role": "user", "content": written_out}, *messages[1:]], [SYSTEM, *messages])
    )
    said = found["input_ids"][0][found["assistant_masks"][0].bool()].tolist()
    labels = PROTOCOL[row]["labels"]
    assert said == [i for i, label in zip(PROTOCOL[row]["input_ids"], labels) if label != -100]
    for name in ("input_ids", "assistant_masks"):
        assert torch.equal(found[name], expected[name])


SYSTEM_MISUSE = [
    ([SYSTEM], "Message 0 has the role 'system'.*None is next"),
    ([SYSTEM, HI], "Message 0 has the role 'system'.*'assistant' is next"),
    ([SYSTEM, SYSTEM, HELLO], "Message 0 has the role 'system'.*'system' is next"),
    ([HELLO, SYSTEM, HELLO], "Message 1 has the role 'system': it must be the first message"),
    ([{"role": "system", "content": [image()]}, HELLO], "Message 0, block 0, has type `image`, but only the user"),
]


@pytest.mark.parametrize(("messages", "message"), SYSTEM_MISUSE)
def test_system_messages_that_make_no_sense(processor, messages, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(messages)
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template([[HELLO], messages])


@pytest.mark.parametrize("messages", [messages for messages, _ in SYSTEM_MISUSE])
def test_the_template_itself_refuses_them(messages):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    with pytest.raises(Exception, match="A message of the role 'system'"):
        tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template([SYSTEM, HELLO], tokenize=False)
    assert prompt == "<|startoftext|><|User|>\nBe brief.\n\nHello!\n"


def test_the_small_checkpoint_has_the_template():
    assert Path(TINY, "chat_template.jinja").read_text(encoding="utf-8") == default_chat_template()


# What the host may change


@pytest.mark.parametrize("kind", ["files", "pictures"])
def test_a_film_in_a_chat_stays_one_film(processor, tmp_path, kind):
    """Hosts rebuild the lists in a conversation (Transformers 5.24); the frames of a film must not become pictures."""
    frames = [picture(g) for g in (10, 60, 110)]
    sources = [str(tmp_path / f"{i}.png") for i in range(3)] if kind == "files" else frames
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i}.png")
    content = [image(), {"type": "video", "video": sources}, text("What?")]
    for chat in ([{"role": "user", "content": content}], [SYSTEM, {"role": "user", "content": content}]):
        for inputs in (apply(processor, chat), apply(processor, [chat], processor_kwargs={"lazy": True})):
            pixel_values = inputs["pixel_values"]
            pixel_values = pixel_values if isinstance(pixel_values, torch.Tensor) else pixel_values.load()
            assert torch.equal(
                pixel_values, processor.image_processor([PICTURE, *frames], return_tensors="pt")["pixel_values"]
            )
            decoded = re.sub("(<image>)+", "<image>", processor.decode(inputs["input_ids"][0])).replace(" ", "")
            assert (
                "<img><image></img>\n<vid><img><image></img><t><img><image></img><t><img><image></img></vid>\nWhat?"
                in decoded
            )


def test_spans_of_what_was_replaced(processor):
    """What hosts move the assistant's spans by, and what offsets into the given text are made from."""
    prompt = "a <video> b <image> c"
    inputs = processor(text=prompt, images=PICTURE, videos=[[PICTURE] * 2], return_text_replacement_offsets=True)
    (spans,) = inputs["text_replacement_offsets"]
    tokens = "<img>" + "<image>" * 144 + "</img>"
    assert [span["type"] for span in spans] == ["video", "image"]
    assert [prompt[slice(*span["span"])] for span in spans] == ["<video>", "<image>"]
    assert [span["replacement"] for span in spans] == [f"<vid>{tokens}<t>{tokens}</vid>", tokens]
    assert spans[1]["new_span"][0] == prompt.index("<image>") + len(spans[0]["replacement"]) - len("<video>")


@pytest.mark.parametrize(
    "kwargs", [{"return_offsets_mapping": True}, {"text_kwargs": {"return_offsets_mapping": True}}]
)
def test_offsets_wherever_they_are_asked_for(processor, kwargs):
    inputs = processor(text="See <image>.", images=PICTURE, **kwargs)
    spans = {tuple(span) for i, span in zip(inputs["input_ids"][0], inputs["offset_mapping"][0]) if i == 516}
    assert spans == {(4, 11)}


def test_truncation_does_not_cut_into_a_picture(processor):
    with pytest.raises(ValueError, match=r"have \[144\] tokens of pictures, and \[\d+\] of them are left"):
        processor(text="<image> What?", images=PICTURE, truncation=True, max_length=50)


# Settings


@pytest.mark.parametrize("source", ["published", "own"])
@pytest.mark.parametrize("auto", [AutoProcessor, LongLLaVAProcessor])
def test_settings_given_when_loading_win(published_copy, source, auto):
    folder = published_copy() if source == "published" else TINY
    size = {"height": 28, "width": 28}
    settings = {
        "do_normalize": False,
        "patch_strategy": "best_fit",
        "image_grid_pinpoints": [[1, 2]],
        "crop_size": size,
    }
    loaded = auto.from_pretrained(folder, **settings, num_frames=3)
    assert loaded.image_processor.do_normalize is False and loaded.image_processor.patch_strategy == "best_fit"
    assert dict(loaded.image_processor.crop_size) == size and loaded.num_frames == 3
    inputs = loaded(text="<image>", images=PICTURE, return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 3, 28, 28) and inputs["pixel_values"].min() >= 0
    assert inputs["input_ids"][0].tolist().count(loaded.image_token_id) == 3 * loaded.image_processor.image_seq_length
    stored = auto.from_pretrained(folder).image_processor
    assert stored.do_normalize is True and stored.patch_strategy == "none"
    assert not set(settings) & set(loaded.tokenizer.init_kwargs)


def test_settings_given_to_the_image_processor_win():
    for auto in (LongLLaVAImageProcessor, AutoImageProcessor):
        try:
            loaded = auto.from_pretrained(TINY, do_normalize=False, patch_strategy="best_fit")
        except ImportError:
            continue  # releases that have no AutoImageProcessor without torchvision
        assert loaded.do_normalize is False and loaded.patch_strategy == "best_fit"


def test_other_components_given_when_loading_win(processor):
    loaded = LongLLaVAProcessor.from_pretrained(TINY, tokenizer=processor.tokenizer, chat_template="x")
    assert loaded.tokenizer is processor.tokenizer and loaded.chat_template == "x"
    assert loaded.image_processor.image_seq_length == 4


def test_a_damaged_file_of_settings_is_not_passed_over(published_copy):
    folder = published_copy()
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(OSError, match=r"preprocessor_config\.json"):
        LongLLaVAProcessor.from_pretrained(folder)


def test_how_films_are_sampled_is_saved(tiny_processor, film, tmp_path):
    """And nothing is declared for a video processor, which there is not."""
    assert not hasattr(tiny_processor, "videos_kwargs") and tiny_processor.num_frames == 128
    processor = LongLLaVAProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, num_frames=5)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict() and again.num_frames == 5
    path = str(film(40))
    assert len(again(text="<video>", videos=path)["pixel_values"]) == 5
    chat = [{"role": "user", "content": [{"type": "video", "path": path}]}]
    assert len(apply(again, chat)["pixel_values"]) == 5
    assert len(apply(again, chat, processor_kwargs={"num_frames": 7})["pixel_values"]) == 7


@pytest.mark.parametrize("conversation", [["hello"], [None], [[]]])
def test_what_is_no_conversation(tiny_processor, conversation):
    with pytest.raises(ValueError, match="A conversation must be a list of at least 1 message"):
        tiny_processor.apply_chat_template(conversation, tokenize=False)


def test_labels_ask_for_no_picture(tiny_processor):
    """However a collator makes them of the ids; and its padding, masked afterwards, stays masked."""
    picture = Image.new("RGB", (28, 28))
    batch = tiny_processor(images=[picture], text=["<image>3"], return_tensors="pt")
    ids, image_token = batch["input_ids"].clone(), tiny_processor.image_token_id
    expected = ids.masked_fill(ids == image_token, -100)
    assert (expected == -100).any() and (expected != -100).any()
    for labels in (ids.clone(), batch["input_ids"], batch["input_ids"].detach()):
        batch["labels"] = labels
        assert torch.equal(batch["labels"], expected) and torch.equal(batch["input_ids"], ids)
    labels = ids.clone()
    batch["labels"] = labels
    labels[:, -1] = -100
    assert batch["labels"][0, -1] == -100
    batch["labels"] = torch.tensor([7])  # a class of the whole prompt
    assert batch["labels"].tolist() == [7]
    for again in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        again["labels"] = ids.clone()
        assert torch.equal(again["labels"], expected)
