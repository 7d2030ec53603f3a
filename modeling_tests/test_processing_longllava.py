"""The token protocol, against the ids of the authors' code, and every way of passing pictures and videos."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from longllava_hf import LongLLaVAProcessor
from longllava_hf.image_processing_longllava import VideoFile

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
        ([{"role": "system", "content": "Be brief."}], r"Message 0 has the role 'system'.*\['user', 'assistant'\]"),
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


def test_pictures_of_one_prompt_do_not_go_to_another(processor):
    with pytest.raises(ValueError, match="Prompt 0 has 2 `<image>`, but 1 images were given for it"):
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
