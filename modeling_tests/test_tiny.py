"""`scripts/tiny`: what the small checkpoint learns from, as far as that goes without the drawings."""

import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from longllava_hf.training import LongLLaVADataCollator


pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from tiny import decoder, tasks
from tiny.model import build_model_and_processor
from tiny.nouns import NOUNS, UNSEEN
from tiny.pictures import IMAGE_SIZE, WIDE, pad, shorten
from tiny.tower import NamingTower, normalize, tower_config


@pytest.fixture(scope="module")
def model_and_processor():
    torch.manual_seed(0)
    return build_model_and_processor()


def said(row: dict) -> list[tuple[list[str], str, str]]:
    """Each question of a row of words: what was shown until then, the question, the answer."""
    shown, result = [], []
    for question, answer in zip(row["messages"][::2], row["messages"][1::2]):
        for block in question["content"]:
            if block["type"] == "video":
                shown = [word["word"] for word in block["words"]]
            elif block["type"] == "image":
                shown = [*shown, block["word"]]
        result.append((shown, question["content"][-1]["text"], answer["content"][0]["text"]))
    return result


def find(text: str, among: list[str]) -> list[str]:
    """Names in a text, in its order; of `bat` and `bathtub` the longer one."""
    pattern = "|".join(rf"\b{re.escape(name)}\b" for name in sorted(among, key=len, reverse=True))
    return re.findall(pattern, text)


def right_answer(shown: list[str], question: str) -> str | None:
    """By another road than `tasks`: from what is shown and what is asked; `None` if this does not know."""
    asked = find(question, [*NOUNS, *tasks.DIGITS])
    place = [tasks.ORDINALS.index(word) for word in find(question, tasks.ORDINALS)]
    if re.match(r"How many|In how many|Count", question):
        return str(shown.count(asked[0]))
    if re.search(r"comes first|appears first", question):
        return min(asked, key=shown.index)
    if re.search(r"comes last|appears last", question):
        return max(asked, key=shown.index)
    if "order" in question.lower() and "Name" not in question:
        return ", ".join(sorted(asked, key=shown.index))
    if re.match(r"Which picture shows|In which picture|Where is", question):
        return tasks.ORDINALS[shown.index(asked[0])]
    if re.search("appears|hidden", question) and not question.startswith("Does"):
        (only,) = {name for name in shown if name != tasks.NOTHING}
        return only
    if question.startswith("Does") and question.endswith("appear?"):
        return "yes" if asked[0] in shown else "no"
    if len(place) == 1 and "one after the other" not in question:
        return shown[place[0]]
    if number := re.search(r"in picture (\d+)\?", question):
        return shown[int(number[1]) - 1]
    return None


def test_answers_are_right():
    kinds, checked = set(), 0
    stage = tasks.text(600)
    assert stage[7] == tasks.text(600)[7] != stage[8]
    for row in stage:
        if any(
            block["type"] == "text" and block["text"].startswith("[")
            for m in row["messages"][::2]
            for block in m["content"]
        ):
            continue  # written, and not in the place of pictures
        invented = {}
        for m in row["messages"][::2]:
            for before, block in zip(m["content"], m["content"][1:]):
                if before["type"] == "image" and (label := find(block.get("text", ""), list(tasks.LABELS))):
                    assert invented.setdefault(before["word"], label[0]) == label[0]
        for shown, question, answer in said(row):
            expected = invented[shown[-1]] if "called" in question and invented else right_answer(shown, question)
            if expected is not None:
                assert answer == expected, (shown, question)
                kinds.add(question.split()[0])
                checked += 1
    assert checked > 800 and len(kinds) >= 10
    assert not set(NOUNS) & set(UNSEEN)


def test_words_stand_where_pictures_will(model_and_processor):
    """A row of words has the ids and labels of the row with pictures, but for the words themselves."""
    processor = model_and_processor[1]
    tokenizer, length = processor.tokenizer, processor.image_processor.image_seq_length
    collator = LongLLaVADataCollator(processor)
    stage, films = tasks.Stage("multi_image", 10), 0
    blank = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    for number in range(40):
        rng = random.Random(number)
        make = (stage.series, stage.needle, stage.count, stage.order)[number % 4]
        row = stage.build(make(rng, "in place", 0.3), rng) if number < 32 else stage.shots(rng, "in place", 0.3)
        pictures = {"messages": [], "images": [], "videos": []}
        for message in row["messages"]:
            content = []
            for block in message["content"]:
                if block["type"] == "image":
                    block.update(word="dog", repeat=length)
                    pictures["images"].append(blank)
                elif block["type"] == "video":
                    films += 1
                    for word in block["words"]:
                        word.update(word="dog", repeat=length)
                    pictures["videos"].append([blank] * len(block["words"]))
                content.append(block if block["type"] == "text" else {"type": block["type"]})
            pictures["messages"].append({"role": message["role"], "content": content})
        ids, labels = decoder.encode(row, tokenizer)
        sample = collator.encode(pictures)
        assert sample.labels.tolist() == labels
        is_picture = sample.input_ids == processor.image_token_id
        assert torch.equal(sample.input_ids[~is_picture], torch.tensor(ids)[~is_picture])
        assert {tokenizer.decode([i]) for i in torch.tensor(ids)[is_picture].tolist()} == {"dog"}
    assert films > 5


@pytest.mark.parametrize("height", WIDE)
def test_wide_pictures_are_padded_as_by_the_processor(model_and_processor, height):
    picture = np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    picture = shorten(picture, height)
    expected = model_and_processor[1].image_processor(picture, return_tensors="pt").pixel_values
    torch.testing.assert_close(normalize([pad(picture)]), expected, atol=1e-5, rtol=0)


def test_tower_is_read_as_by_the_model(model_and_processor):
    """What `tiny.tower` classifies is what the model projects, from the same weights."""
    model = model_and_processor[0]
    tower = NamingTower(tower_config())
    missing = model.model.vision_tower.load_state_dict(tower.tower.state_dict(), strict=False)
    assert not missing.unexpected_keys and all("layers.5." in name for name in missing.missing_keys)
    pixels = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        projected = model.model.multi_modal_projector(tower.features(pixels))
        torch.testing.assert_close(
            torch.stack(list(model.model.get_image_features(pixels).pooler_output)), projected, atol=1e-5, rtol=1e-5
        )


def test_what_a_decoder_says_does_not_come_from_its_neighbours(model_and_processor):
    model, processor = model_and_processor
    encoded = [decoder.encode(row, processor.tokenizer) for row in (tasks.text(50)[i] for i in range(3))]
    with torch.no_grad():
        together = model.eval()(**decoder.pack(encoded)).logits
        alone = [model(input_ids=torch.tensor([ids])).logits for ids, _ in encoded]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=1e-4, rtol=1e-4)


def test_drills_ask_for_what_was_shown(model_and_processor):
    tokenizer = model_and_processor[1].tokenizer
    drills, added = decoder.Drills(tokenizer, seed=0), 0
    while True:
        for number in range(drills.newest + 1):
            ids, labels = drills.example(number)
            assert all(label in (-100, token) for token, label in zip(ids, labels))
            # Up to each answer, and the answer.
            for place in (place for place, label in enumerate(labels) if label != -100):
                pieces = [tokenizer.decode([token]) for token in ids[: place + 1]]
                text = "".join(f" {piece} " if piece in tasks.LABELS else piece for piece in pieces[:-1])
                words = find(text, [*NOUNS, *tasks.DIGITS, *tasks.LABELS])
                answer, asked = pieces[-1], words[-1]
                shown, called = words[:-1], drills.ALL[number][0] != drills.PICTURE
                assert asked in drills.words[: drills.known]
                if called:
                    assert answer == shown[shown.index(asked) + 1] and answer in tasks.LABELS
                else:
                    count = drills.ALL[number][2]
                    expected = (
                        tasks.ORDINALS[shown.index(asked)]
                        if answer in tasks.ORDINALS
                        else str(shown[:count].count(asked))
                    )
                    assert answer == expected
        if drills.is_done:
            break
        drills.grow()
        added += 1
    assert 20 < added < 40 and len(drills.words) == len(NOUNS) + 10


def test_examples_of_a_drill_fill_a_step(model_and_processor):
    drills = decoder.Drills(model_and_processor[1].tokenizer, seed=0)
    drills.newest = len(drills.ALL) - 1
    for is_new, batch in (drills.batch(200) for _ in range(20)):
        assert isinstance(is_new, bool) and 200 <= batch["input_ids"].shape[1] < 300
        assert (batch["labels"] != -100).sum() >= 2 and (batch["position_ids"] == 0).sum() > 1
