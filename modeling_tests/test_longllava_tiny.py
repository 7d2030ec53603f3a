"""The checkpoint that ships with the package, end to end: from files to right answers, by every road."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, pipeline

import longllava_hf
from longllava_hf import TINY, cli
from longllava_hf.video_longllava import VideoFile

from .conftest import small_config


EXAMPLES = Path(__file__).parent.parent / "examples"
DIGITS = {name: str(EXAMPLES / f"{name}.png") for name in ("three", "seven")}
FILM = str(EXAMPLES / "film.mp4")
FILM_DIGIT = "5"

pytestmark = pytest.mark.skipif(not Path(TINY, "config.json").is_file(), reason="the checkpoint is not there")


def ask(*arguments: str, capsys) -> dict:
    assert cli.main(["ask", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_digit(capsys):
    result = ask(DIGITS["three"], "Which digit is this?", capsys=capsys)
    assert result["answer"] == "3" and result["files"] == [{"path": DIGITS["three"], "kind": "image"}]


def test_digits_in_series(capsys):
    files = [DIGITS["three"], DIGITS["seven"], DIGITS["three"], DIGITS["seven"]]
    for place, answer in (("first", "3"), ("second", "7"), ("third", "3"), ("fourth", "7")):
        assert ask(*files, f"Which digit is the {place} picture?", capsys=capsys)["answer"] == answer


def test_a_film(capsys):
    result = ask(FILM, "Which digit appears in this film?", capsys=capsys)
    assert result["answer"] == FILM_DIGIT
    assert result["files"][0]["kind"] == "video" and result["files"][0]["frames"] == 64


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 499, 999])
def test_a_digit_among_a_thousand_pictures(tiny_model, tiny_processor, place):
    """Scenes of a film again and again, and one picture of another kind: read in chunks, and in one."""
    scenes = [frame for i, frame in enumerate(VideoFile(FILM)) if i != 41]  # the 42nd is a digit itself
    pictures = [scenes[i % len(scenes)] for i in range(1000)]
    pictures[place] = DIGITS["seven"]
    content = [{"type": "image", "image": picture} for picture in pictures]
    content.append({"type": "text", "text": "Which digit appears in these pictures?"})
    inputs = tiny_processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"lazy": True},
    )
    length = inputs["input_ids"].shape[1]
    assert length > 7000
    for chunk in (None, length):
        output = tiny_model.generate(**inputs, max_new_tokens=3, do_sample=False, prefill_chunk_size=chunk)
        assert tiny_processor.decode(output[0, length:], skip_special_tokens=True).strip() == "7"


def test_files_are_told_by_content(tmp_path, capsys):
    (tmp_path / "picture.mp4").write_bytes(Path(DIGITS["seven"]).read_bytes())
    (tmp_path / "film.png").write_bytes(Path(FILM).read_bytes())
    assert ask(str(tmp_path / "picture.mp4"), "Which digit is this?", capsys=capsys)["answer"] == "7"
    result = ask(str(tmp_path / "film.png"), "Which digit appears in this film?", "--num-frames", "64", capsys=capsys)
    assert result["answer"] == FILM_DIGIT


def test_an_animated_picture_is_a_video(tmp_path, capsys):
    frames = [Image.open(DIGITS["seven"]).convert("RGB").rotate(i) for i in (0, 2, 4)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    result = ask(str(tmp_path / "x.gif"), "Which digit appears in this video?", capsys=capsys)
    assert result["files"][0]["kind"] == "video" and result["files"][0]["frames"] == 3


def test_streaming_and_chunks(capsys):
    assert cli.main(["ask", FILM, "Which digit appears in this film?", "--prefill-chunk-size", "50"]) == 0
    assert capsys.readouterr().out.strip() == FILM_DIGIT


def test_chat_keeps_what_it_has_seen(capsys, monkeypatch):
    turns = iter(
        [f"/show {DIGITS['three']}", "Which digit is this?", f"/show {DIGITS['seven']}", "Which digit is this?"]
    )

    def next_line(prompt=""):
        try:
            return next(turns)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", next_line)
    assert cli.main(["chat", "--json"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert results[0]["answer"] == "3" and results[1]["prompt_tokens"] < 40


def test_chat_equals_starting_anew(tiny_model, tiny_processor):
    """The second turn on the kept cache is what the whole conversation would have given."""
    arguments = cli.build_parser().parse_args(["chat", "--max-new-tokens", "6"])
    session = cli.open_session(arguments)
    three, seven = (cli.open_visual(DIGITS[name]) for name in ("three", "seven"))
    first = session.ask([three], "Which digit is this?")["answer"]
    second = session.ask([seven], "Which digit is the second picture?")["answer"]
    messages = [
        {"role": "user", "content": [three.block, {"type": "text", "text": "Which digit is this?"}]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": [seven.block, {"type": "text", "text": "Which digit is the second picture?"}]},
    ]
    inputs = tiny_processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = tiny_model.generate(**inputs, max_new_tokens=6)
    expected = tiny_processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert second == expected.strip()


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty: it has 0 bytes"), (b"hello", "neither a picture nor a video"), (None, "is not a file")],
)
def test_one_line_for_what_cannot_be_read(tmp_path, capsys, content, said):
    path = tmp_path / "culprit.png"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["ask", str(path), "What is this?"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "culprit.png" in error and "Traceback" not in error


def test_info_and_convert(tmp_path, capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["attention layers"] == "4" and facts["parameters"] < 4e6
    assert cli.main(["info"]) == 0 and "expert layers" in capsys.readouterr().out
    assert cli.main(["info", "--profile", "--context", "20", "--json"]) == 0
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    assert {"LongLLaVAMambaMixer", "LongLLaVAAttention", "LongLLaVASparseMoeBlock", "lm_head", "rest"} < seconds.keys()
    assert min(value for part, value in seconds.items() if part != "rest") > 0
    assert cli.main(["convert", TINY, str(tmp_path / "published"), "--to", "published"]) == 0
    assert "published layout, 1 files" in capsys.readouterr().out
    assert json.loads((tmp_path / "published" / "config.json").read_text())["model_type"] == "llava_jamba"
    question = [DIGITS["three"], "Which digit is this?"]
    assert ask(*question, "--model", str(tmp_path / "published"), capsys=capsys)["answer"] == "3"
    assert cli.main(["convert", TINY, str(tmp_path / "published")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_pipeline():
    pipe = pipeline("image-text-to-text", model=TINY)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "url": DIGITS["three"]},
                {"type": "image", "image": Image.open(DIGITS["seven"])},
                {"type": "text", "text": "Which digit is the second picture?"},
            ],
        }
    ]
    assert pipe(text=messages, return_full_text=False, max_new_tokens=4)[0]["generated_text"].strip() == "7"
    assert pipe(text=messages, max_new_tokens=4)[0]["generated_text"][-1]["content"].strip() == "7"
    system = {"role": "system", "content": "You read digits."}
    assert pipe(text=[system, *messages], return_full_text=False, max_new_tokens=4)[0]["generated_text"]
    prompt = "<image>\nWhich digit is this?\n"
    answer = pipe(images=DIGITS["three"], text=prompt, return_full_text=False, max_new_tokens=4)
    assert answer[0]["generated_text"].strip() == "3"


def test_a_batch_of_conversations(tiny_model, tiny_processor):
    messages = [
        [{"role": "user", "content": [{"type": "image", "path": path}, {"type": "text", "text": "Which digit is this?"}]}]
        for path in DIGITS.values()
    ] + [[{"role": "user", "content": [{"type": "video", "path": FILM}, {"type": "text", "text": "Which digit appears in this film?"}]}]]  # fmt: skip
    inputs = tiny_processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    output = tiny_model.generate(**inputs, max_new_tokens=4)
    answers = tiny_processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [answer.strip() for answer in answers] == ["3", "7", FILM_DIGIT]


def test_held_out_digits(tiny_model, tiny_processor):
    """A hundred of the scans that were never trained on."""
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
    from tiny.evaluate import answers
    from tiny.pictures import digit_scans, draw_digit

    scans, digits = (part[:100] for part in digit_scans()["test"])
    question = {"type": "text", "text": "Which digit is this?"}
    cases = [
        ([{"type": "image", "image": Image.fromarray(draw_digit(scan))}, question], str(digit))
        for scan, digit in zip(scans, digits)
    ]
    given = answers(tiny_model, tiny_processor, cases, batch=50)
    assert sum(answer == digit for answer, (_, digit) in zip(given, cases)) >= 96


def test_fine_tuning_lowers_the_loss_and_reloads(tmp_path, tiny_processor):
    """The checkpoint learns that a three is called eight, keeps it when saved, and answers so."""
    model = AutoModelForImageTextToText.from_pretrained(TINY)
    messages = [
        {"role": "user", "content": [{"type": "image", "path": DIGITS["three"]}, {"type": "text", "text": "Which digit is this?"}]},
        {"role": "assistant", "content": "8"},
    ]  # fmt: skip
    batch = tiny_processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    mask = batch.pop("assistant_masks")
    example = {**batch, "labels": torch.where(mask.bool(), batch["input_ids"], -100)}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=10, per_device_train_batch_size=1, learning_rate=1e-3, logging_steps=1,
        report_to="none", remove_unused_columns=False, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=[example] * 10, data_collator=lambda rows: rows[0])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.2 * losses[0]
    trainer.save_model(tmp_path / "tuned")
    tiny_processor.save_pretrained(tmp_path / "tuned")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "tuned").eval()
    prompt = AutoProcessor.from_pretrained(tmp_path / "tuned").apply_chat_template(
        messages[:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**prompt, max_new_tokens=2)
    assert tiny_processor.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip() == "8"


def test_import_is_idempotent_and_quick():
    script = (
        "import importlib, sys, torch, transformers, longllava_hf\n"
        "importlib.reload(longllava_hf)\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not {'av', 'peft', 'bitsandbytes', 'longllava_hf.cli', 'longllava_hf.convert'} & set(sys.modules)\n"
        "print(longllava_hf.__version__)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == longllava_hf.__version__


def test_everything_public_is_listed():
    assert set(longllava_hf.__all__) >= {"LongLLaVAConfig", "LongLLaVAForConditionalGeneration", "LongLLaVAProcessor"}
    assert all(hasattr(longllava_hf, name) for name in longllava_hf.__all__)
    assert small_config().image_seq_length == 4
