"""Rows, labels, conversion and packing, against the labels of the authors' code."""

import json
import random

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import longllava_hf
from longllava_hf import LongLLaVAConfig, LongLLaVAForConditionalGeneration
from longllava_hf.cli import main
from longllava_hf.training import (
    LongLLaVADataCollator,
    PackedDataset,
    convert_data,
    convert_sample,
    draw_lengths,
    plan_bins,
    token_lengths,
    video_row,
    with_sub_images,
)

from .conftest import FIXTURES


PUBLISHED = json.loads((FIXTURES / "training_labels.json").read_text())


def picture(shade: int = 0, size: tuple[int, int] = (20, 20)) -> Image.Image:
    return Image.new("RGB", size, (shade % 256, 0, 0))


def says(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


@pytest.mark.parametrize("kind", PUBLISHED)
def test_labels_are_the_authors(processor, tmp_path, kind):
    """From the authors' JSON to ids and labels, each token."""
    expected = PUBLISHED[kind]
    count = expected["input_ids"].count(-200)
    names = [f"{i}.png" for i in range(count)]
    for name in names:
        picture().save(tmp_path / name)
    row = convert_sample({"conversations": expected["conversations"], "image": names}, str(tmp_path))
    collator = LongLLaVADataCollator(processor)
    batch = collator([row])
    repeats = [144 if token == -200 else 1 for token in expected["input_ids"]]
    ids = [processor.image_token_id if token == -200 else token for token in expected["input_ids"]]
    for name, wanted in (("input_ids", ids), ("labels", expected["labels"])):
        wanted = [token for token, times in zip(wanted, repeats) for _ in range(times)]
        assert batch[name].tolist() == [wanted], name
    assert ("pixel_values" in batch) == (count > 0)
    assert count == 0 or batch["pixel_values"].shape == (count, 3, 336, 336)
    assert collator.length(row) == sum(repeats)


def test_sub_images_and_blocks(processor):
    """A picture that is cut, and pictures in blocks, give what the authors write out."""
    expected = PUBLISHED["patches"]["input_ids"]
    row = {"messages": says("<image>\nRead the sign.", "It says 12 km."), "images": [picture(size=(600, 600))]}
    sample = LongLLaVADataCollator(processor).encode(with_sub_images(row, [[2, 2]]))
    assert sample.input_ids.unique_consecutive().tolist() == [
        processor.image_token_id if token == -200 else token for token in expected
    ]
    assert len(sample.pixel_values) == 5

    expected = PUBLISHED["multi_turn"]
    text = [turn["value"] for turn in expected["conversations"]]
    blocks = [
        {"type": "image", "text": None},  # as Arrow fills it in
        {"type": "text", "text": "This is a cat. "},
        {"type": "image"},
        {"type": "text", "text": "This is a:"},
    ]
    messages = says(*text)
    messages[0]["content"] = blocks
    sample = LongLLaVADataCollator(processor).encode({"messages": messages, "images": [picture(), picture()]})
    labels = sample.labels[sample.labels != -100].tolist()
    assert labels == [token for token in expected["labels"] if token != -100]


def test_a_batch_is_padded_on_the_right(tiny_processor, tiny_model):
    rows = [
        {"messages": says("<image>\nWhich digit is this?", "3"), "images": [picture()]},
        {
            "messages": says("Hello there, who are you?", "no", "<image>\n<image>\nAnd?", "4"),
            "images": [picture(9)] * 2,
        },
    ]
    batch = LongLLaVADataCollator(tiny_processor, pad_to_multiple_of=16)(rows)
    assert {name: tuple(x.shape) for name, x in batch.items() if name != "pixel_values"} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, batch["labels"].shape[1])
    )
    assert batch["labels"].shape[1] % 16 == 0 and len(batch["pixel_values"]) == 3
    lengths = batch["attention_mask"].sum(1)
    for row, length, ids, labels in zip(rows, lengths, batch["input_ids"], batch["labels"]):
        alone = LongLLaVADataCollator(tiny_processor)([row])
        assert ids[:length].tolist() == alone["input_ids"][0].tolist()
        assert labels[:length].tolist() == alone["labels"][0].tolist() and (labels[length:] == -100).all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"id": "a7", "messages": says("<image>", "x")},
            "Sample 'a7': There are 1 places for images .* but 0 `images`",
        ),
        (
            {"messages": says("<image>", "x"), "images": [picture()] * 2},
            "Sample 0: There are 1 places for images .* but 2",
        ),
        (
            {"messages": says("<image>", "x"), "images": [{"path": None}]},
            "Sample 0: Item 0 of `images` has no `bytes`",
        ),
        ({"messages": "hello"}, r"Sample 0: .* \['str'\]"),
        ({"messages": says("hm", "x"), "processor_kwargs": {"padding": "max_length"}}, r"has \['padding'\]"),
        ({"messages": says("hm", "x"), "processor_kwargs": {"patches": "best_fit"}}, "patches"),
        (
            {"messages": says("hm", "x", "y")},
            r"must be by 'user' and 'assistant' in turn .* \['user', 'assistant', 'user'\]",
        ),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "in turn"),
        ({"messages": []}, "in turn"),
        ({}, "remove_unused_columns=False"),
        ({"messages": says("<|User|>", "x")}, "Sample 0: Message 0 has `<|User|>`"),
        ({"messages": says("hm", "<image>")}, "Sample 0: Message 1 has `<image>`"),
        ({"messages": says("<image>", "x"), "images": ["gone.png"]}, "Sample 0: .*gone.png"),
        ({"messages": says("<video>", "x"), "videos": ["gone.mp4"]}, "Sample 0: .*gone.mp4"),
        ({"messages": says("word " * 50, "x")}, "Sample 0: It has .* tokens, and `max_length` is 40"),
    ],
)
def test_rows_that_are_wrong(tiny_processor, row, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        LongLLaVADataCollator(tiny_processor, max_length=40)([row])


def test_truncation_keeps_pictures_whole(tiny_processor):
    row = {"messages": says("<image>\nWhat is it?", "no", "<image>", "yes"), "images": [picture(), picture(1)]}
    whole = LongLLaVADataCollator(tiny_processor).encode(row)
    per_tile = int((whole.input_ids == tiny_processor.image_token_id).sum()) // 2
    first = int((whole.input_ids == tiny_processor.image_token_id).nonzero()[0])
    for max_length in range(first + per_tile + 20, len(whole.input_ids)):
        for lazy in (False, True):
            collator = LongLLaVADataCollator(tiny_processor, max_length=max_length, truncation=True, lazy=lazy)
            try:
                sample = collator.encode(row)
            except ValueError as error:
                assert "Nothing that the assistant says is there to be learned within `max_length`" in str(error)
                continue
            assert len(sample.input_ids) <= max_length and collator.length(row) == len(sample.input_ids)
            assert torch.equal(sample.input_ids, whole.input_ids[: len(sample.input_ids)])
            assert int((sample.input_ids == tiny_processor.image_token_id).sum()) == per_tile * len(
                sample.pixel_values
            )
    with pytest.raises(ValueError, match="Nothing that the assistant says is there to be learned within `max_length`"):
        LongLLaVADataCollator(tiny_processor, max_length=first + 1, truncation=True).encode(row)


def test_bins_hold_everything_once():
    rng = random.Random(0)
    lengths = [min(4000, int(rng.lognormvariate(5, 1)) + 10) for _ in range(3000)]
    bins = plan_bins(lengths, 4096)
    assert sorted(row for rows in bins for row in rows) == list(range(3000))
    assert all(sum(lengths[row] for row in rows) <= 4096 for rows in bins)
    assert bins == plan_bins(lengths, 4096) and 1 - sum(lengths) / (4096 * len(bins)) < 0.01
    assert plan_bins([5, 5, 5, 10], 10) == [[0, 1], [2], [3]]
    in_order = plan_bins(lengths, 4096, window=100)
    assert sorted(row for rows in in_order for row in rows) == list(range(len(lengths)))
    windows = [{row // 100 for row in rows} for rows in in_order]
    assert all(len(window) == 1 for window in windows) and windows == sorted(windows, key=min)
    with pytest.raises(ValueError, match="`window` must be a number of rows, but is 0"):
        plan_bins(lengths, 4096, window=0)
    with pytest.raises(
        ValueError, match=r"2 of 3 rows have more than `max_length` \(10\) tokens: rows \[0, 2\].* \(2\) 12"
    ):
        plan_bins([11, 3, 12], 10)


def mixed_rows(count: int, seed: int = 0) -> list[dict]:
    """Text, pictures and films, of one turn and more."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        kind = rng.choice(["text", "picture", "pictures", "film", "turns"])
        images, videos = [], []
        words = ["which", "digit", "is", "this"]
        turns = [" ".join(rng.choices(words, k=rng.randint(1, 30))), rng.choice("0123456789")]
        if kind == "picture":
            images, turns[0] = [picture(number)], "<image>\n" + turns[0]
        elif kind == "pictures":
            images = [picture(number + i) for i in range(rng.randint(2, 5))]
            turns[0] = "<image>\n" * len(images) + turns[0]
        elif kind == "film":
            videos, turns[0] = [[picture(number + i) for i in range(rng.randint(1, 6))]], "<video>\n" + turns[0]
        elif kind == "turns":
            turns += [rng.choice(words), "7", "<image>\nthis", "8"]
            images = [picture(number)]
        rows.append({"id": str(number), "messages": says(*turns), "images": images, "videos": videos})
    return rows


@pytest.mark.slow
def test_a_thousand_rows_packed(tiny_processor):
    """None is lost, less than 5 % is empty, and the loss is the mean over the rows alone."""
    config = LongLLaVAConfig.from_pretrained(longllava_hf.TINY)
    text = config.text_config.to_dict()
    text.update(num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1)
    torch.manual_seed(0)
    model = LongLLaVAForConditionalGeneration(LongLLaVAConfig(**{**config.to_dict(), "text_config": text}))
    model = model.double().eval()  # where a router is undecided, no rounding decides
    rows = mixed_rows(1000)
    collator = LongLLaVADataCollator(tiny_processor)
    packed = PackedDataset(rows, token_lengths(rows, collator), max_length=512)
    assert packed.waste < 0.05
    assert sorted(row["id"] for i in range(len(packed)) for row in packed[i]) == sorted(row["id"] for row in rows)

    loader = DataLoader(packed, batch_size=2, collate_fn=collator, num_workers=2)
    together, tokens, pictures = 0.0, 0, 0
    with torch.no_grad():
        for number, batch in enumerate(loader):
            pictures += len(batch.get("pixel_values", ()))
            starts = int((batch["position_ids"] == 0).sum())
            assert starts == sum(map(len, packed.bins[2 * number : 2 * number + 2]))
            learned = int((batch["labels"] != -100).sum())
            together += float(model(**batch).loss) * learned
            tokens += learned
        alone, tokens_alone = 0.0, 0
        for row in rows:
            batch = collator([row])
            learned = int((batch["labels"] != -100).sum())
            alone += float(model(**batch).loss) * learned
            tokens_alone += learned
    assert tokens == tokens_alone
    assert pictures == sum(len(row["images"]) + sum(map(len, row["videos"])) for row in rows)
    assert together / tokens == pytest.approx(alone / tokens, rel=1e-5)


def test_lazy_pictures_in_workers(tiny_processor, tiny_model, tmp_path):
    for i in range(6):
        picture(40 * i).save(tmp_path / f"{i}.png")
    rows = [
        {
            "messages": says("<image>\n" * 3 + "Which?", "3"),
            "images": [str(tmp_path / f"{i + j}.png") for j in range(3)],
        }
        for i in range(4)
    ]
    rows[0] = with_sub_images(rows[0], [[1, 2]])  # beside rows that are not cut
    eager, lazy = (LongLLaVADataCollator(tiny_processor, lazy=lazy) for lazy in (False, True))
    batches = [list(DataLoader(rows, 2, collate_fn=c, num_workers=2)) for c in (eager, lazy)]
    for expected, found in zip(*batches):
        assert isinstance(found["pixel_values"], longllava_hf.LazyPixelValues)
        assert torch.equal(found["pixel_values"].load(), expected["pixel_values"])
        with torch.no_grad():
            assert torch.equal(tiny_model(**found).loss, tiny_model(**expected).loss)
    both = [with_sub_images(rows[1], [[1, 2]]), with_sub_images(rows[2], [[2, 1]])]  # each cut in its own way
    assert torch.equal(lazy(both)["pixel_values"].load(), eager(both)["pixel_values"])
    assert torch.equal(lazy(both)["pixel_values"][4:12], eager(both)["pixel_values"][4:12])


def test_sources_of_pictures(tiny_processor, tmp_path, film):
    """A picture is the same in whatever way it is given, and before the text where no place is, as in TRL."""
    picture(200).save(tmp_path / "x.png")
    path, data = str(tmp_path / "x.png"), (tmp_path / "x.png").read_bytes()
    collator = LongLLaVADataCollator(tiny_processor)
    expected = collator([{"messages": says("<image>\nWhich?", "3"), "images": [path]}])

    def shown(*blocks) -> list[dict]:
        return [{"role": "user", "content": [*blocks, {"type": "text", "text": "Which?"}]}, says("", "3")[1]]

    for row in (
        {"messages": says("<image>\nWhich?", "3"), "images": [{"bytes": data, "path": None}]},
        {"messages": says("<image>\nWhich?", "3"), "images": picture(200)},
        {"messages": says("Which?", "3"), "images": (path,), "videos": None},
        {"messages": shown({"type": "image"}), "images": [path]},
        {"messages": shown({"type": "image", "path": path, "text": None})},
        {"messages": shown({"type": "image", "image": {"bytes": data}}), "images": []},
    ):
        batch = collator([row])
        assert all(torch.equal(batch[name], expected[name]) for name in expected), row

    frames = [{"bytes": data}] * 2
    wanted = collator([{"messages": says("<video>\nWhich?", "3"), "videos": [[path, path]]}])
    for row in (
        {"messages": says("<video>\nWhich?", "3"), "videos": [tuple(frames)]},
        {"messages": shown({"type": "video", "video": frames})},
    ):
        assert torch.equal(collator([row])["pixel_values"], wanted["pixel_values"])
    row = {
        "messages": says("<video>", "3"),
        "videos": [str(film(20))],
        "processor_kwargs": {"num_frames": 5, "fps": None},
    }
    assert len(collator([row])["pixel_values"]) == 5


def test_a_template_that_marks_nothing(tiny_processor):
    """All labels would be -100."""
    import copy

    processor = copy.deepcopy(tiny_processor)
    processor.chat_template = processor.chat_template.replace("generation -%}", "if true -%}").replace(
        "endif true -%}", "endif -%}"
    )
    with pytest.raises(ValueError, match="Sample 0: Nothing that the assistant says"):
        LongLLaVADataCollator(processor)([{"messages": says("a", "b")}])


def test_datasets_rows(tiny_processor, tmp_path):
    """Rows as `datasets` gives them back, decoded or not, and a column of lengths for `group_by_length`."""
    datasets = pytest.importorskip("datasets")
    picture(200).save(tmp_path / "x.png")
    rows = [{"messages": says("<image>\nWhich?", "3"), "images": [str(tmp_path / "x.png")]}] * 2
    collator = LongLLaVADataCollator(tiny_processor)
    expected = collator(rows)
    plain = datasets.Dataset.from_list(rows)
    for decode in (True, False):
        dataset = plain.cast_column("images", datasets.List(datasets.Image(decode=decode)))
        assert torch.equal(collator([dataset[0], dataset[1]])["pixel_values"], expected["pixel_values"])
    lengths = token_lengths(plain, collator, num_workers=2)
    assert lengths == [expected["input_ids"].shape[1]] * 2
    assert plain.add_column("length", lengths)[0]["length"] == lengths[0]


def train(model, dataset, collator, folder, **arguments) -> tuple[Trainer, list[dict]]:
    """Train for a few steps; the batches that the model got."""
    batches = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: batches.append(kwargs), with_kwargs=True)
    arguments = {
        "max_steps": 2,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "remove_unused_columns": False,
        **arguments,
    }
    arguments = TrainingArguments(str(folder), report_to="none", use_cpu=True, **arguments)
    trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=collator)
    trainer.train()
    hook.remove()
    return trainer, batches


def test_under_trainer(tiny_processor, tmp_path):
    """Lazy pictures in workers, packed rows, rows of like length, and a stream."""
    datasets = pytest.importorskip("datasets")
    model = LongLLaVAForConditionalGeneration.from_pretrained(longllava_hf.TINY)
    for i in range(8):
        picture(30 * i).save(tmp_path / f"{i}.png")
    rows = [
        {
            "messages": says("<image>\n" * (1 + i % 3) + "Which digit is it? " * (i % 4), "3"),
            "images": [str(tmp_path / f"{j}.png") for j in range(1 + i % 3)],
        }
        for i in range(8)
    ]
    collator = LongLLaVADataCollator(tiny_processor, lazy=True)
    _, batches = train(model, rows, collator, tmp_path, dataloader_num_workers=2, per_device_train_batch_size=2)
    assert all(isinstance(batch["pixel_values"], longllava_hf.LazyPixelValues) for batch in batches)

    collator = LongLLaVADataCollator(tiny_processor)
    lengths = token_lengths(rows, collator)
    packed = PackedDataset(rows, lengths, max_length=max(lengths) + 10)
    for remove in (True, False):  # lists of rows have no columns to remove
        _, batches = train(model, packed, collator, tmp_path, remove_unused_columns=remove)
        assert all("position_ids" in batch and "attention_mask" not in batch for batch in batches)

    dataset = datasets.Dataset.from_list(rows).add_column("length", lengths)
    order = sorted(range(8), key=lambda i: lengths[i])
    dataset = dataset.select(order)  # the longest is the last, and of those that are grouped the first
    for seed in range(3):
        options = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2, "seed": seed}
        _, batches = train(model, dataset, collator, tmp_path, **options)
        assert batches[0]["input_ids"].shape[1] == max(lengths)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        train(model, dataset, collator, tmp_path, remove_unused_columns=True)

    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    options = {"per_device_train_batch_size": 2, "accelerator_config": {"dispatch_batches": False}}
    _, batches = train(model, stream, collator, tmp_path, **options)
    assert [len(batch["pixel_values"]) for batch in batches] == [3, 4]
    with pytest.raises(ValueError, match=r"dispatch_batches"):
        train(model, stream, collator, tmp_path, per_device_train_batch_size=2)


def llava_json(tmp_path) -> list[dict]:
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "film.mp4").write_bytes(b"not looked into")
    human, gpt = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}
    return [
        {"id": "one", "image": "0.png", "conversations": [human, gpt]},
        {"image": ["0.png", "1.png"], "conversations": [{**human, "value": "<image> and <image>."}, gpt]},
        {"id": 3, "video": "film.mp4", "conversations": [human, gpt]},
        {"conversations": [{**human, "value": "Hi"}, gpt, {**human, "value": "Bye"}, gpt]},
        {
            "image": ["0.png", "1.png", "2.png"],
            "conversations": [
                {
                    "from": "human",
                    "value": "<img><image></img><vid><img><image></img><t><img><image></img></vid>\nWhat?",
                },
                gpt,
            ],
        },
    ]


def test_conversion_of_llava_json(tmp_path, capsys):
    samples = llava_json(tmp_path)
    (tmp_path / "data.json").write_text(json.dumps(samples))
    assert (
        main(["data", "convert", str(tmp_path / "data.json"), str(tmp_path / "rows.jsonl"), "--num-frames", "8"]) == 0
    )
    assert "Wrote 5 rows with 4 images and 2 videos." in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    file = lambda i: str(tmp_path / f"{i}.png")  # noqa: E731
    assert rows[0] == {"id": "one", "messages": says("<image>\nWhat?", "A."), "images": [file(0)], "videos": []}
    assert rows[1]["messages"][0]["content"] == "<image> and <image>." and rows[1]["images"] == [file(0), file(1)]
    assert rows[2] == {
        **video_row(str(tmp_path / "film.mp4"), "What?", "A.", num_frames=8, id="3"),
    }
    assert rows[4]["messages"][0]["content"] == "<image><video>\nWhat?"
    assert rows[4]["images"] == [file(0)] and rows[4]["videos"] == [[file(1), file(2)]]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, samples)))
    convert_data(tmp_path / "data.jsonl", tmp_path / "again.jsonl", num_frames=8)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "rows.jsonl").read_bytes()


def test_conversion_names_what_is_wrong(tmp_path, capsys):
    samples = llava_json(tmp_path)
    gone, turns, places = (json.loads(json.dumps(samples[0])) for _ in range(3))
    gone.update(id="gone", image="gone.png")
    turns.update(id="turns", conversations=turns["conversations"] + turns["conversations"][:1])
    places.update(id="places", image=["0.png", "1.png"])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    broken = {**samples[0], "id": "broken", "image": "broken.png"}
    human, gpt = samples[0]["conversations"]
    said = {"id": "said", "conversations": [{**human, "value": "<|User|>"}, gpt]}
    shows = {"id": "shows", "conversations": [{**human, "value": "?"}, {**gpt, "value": "<image>"}]}
    bad = [gone, turns, places, broken, {"id": "none"}, 5, said, shows, {**samples[0], "id": "odd", "image": [None]}]
    (tmp_path / "data.json").write_text(json.dumps([*samples, *bad]))
    command = ["data", "convert", str(tmp_path / "data.json"), str(tmp_path / "rows.jsonl")]
    assert main(command) == 2
    assert "Sample 'gone': There is no image" in capsys.readouterr().err and not (tmp_path / "rows.jsonl").exists()
    assert main([*command, "--skip-bad", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rows"] == 5
    wanted = ["'gone': There is no image", "'turns': The messages must", "'places': its turns have 1 `<image>`, but"]
    wanted += ["'broken': ", "'none': it must be an object with a list `conversations`", "10: it must be an object"]
    wanted += ["'said': the text of its user has <|User|>", "'shows': the text of its assistant has <image>"]
    wanted += ["'odd': `image` must be a name or a list of names"]
    assert len(result["skipped"]) == len(wanted)
    for message, found in zip(wanted, result["skipped"]):
        assert found.startswith(f"Sample {message}"), found
    (tmp_path / "data.json").write_text("[5]")
    assert main([*command, "--skip-bad"]) == 2 and "has no samples to write" in capsys.readouterr().err
    (tmp_path / "data.json").write_text("{")
    assert main(command) == 2 and "is no JSON" in capsys.readouterr().err
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 5  # as it was


def test_histogram(tmp_path):
    pytest.importorskip("matplotlib")
    draw_lengths([5, 9, 200], tmp_path / "lengths.png", max_length=512)
    assert Image.open(tmp_path / "lengths.png").format == "PNG"


def test_a_tokenizer_must_end_texts(tiny_processor):
    import copy

    processor = copy.deepcopy(tiny_processor)
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="must have a `pad_token`"):
        LongLLaVADataCollator(processor)
