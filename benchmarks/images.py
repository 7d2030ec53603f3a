# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
A thousand pictures from disk through the small checkpoint, on the CPU: whether a digit among them is found, the time, and
the most memory beyond the loaded model, against the same weights in Transformers' own classes: CLIP's image processor in
a loop, its tower, and Jamba in one pass. Each measurement has a process of its own.

    pip install -e ".[train,plot]"
    python benchmarks/images.py [--images 10 100 500 1000 2000] [--alone 5000]
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from report import RESULTS, draw, machine, peak_of, print_table, run_apart, write_json
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, JambaForCausalLM
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import longllava_hf
from longllava_hf import LongLLaVAForCausalLM
from longllava_hf.modeling_longllava import pool_patches


sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from tiny.assets import TEST_FOOTAGE, footage
from tiny.pictures import digit_scans, draw_digit


PEER = "Transformers' classes"
RELATIVE = "time / theirs with the fewest"
QUESTION = "Which digit appears in these pictures?"
PLACES = {"start": 0.0, "middle": 0.5, "end": 1.0}


def write_pictures(folder: Path, count: int) -> int:
    """Footage that was never trained on, as files, and a digit `needle.png`; returns which."""
    frames = [frame.resize((160, 90)) for frame in footage(TEST_FOOTAGE)]
    for i in range(count):
        frames[i % len(frames)].save(folder / f"{i:05}.jpg")
    scans, digits = digit_scans()["test"]
    Image.fromarray(draw_digit(scans[0], (160, 90))).save(folder / "needle.png")
    return int(digits[0])


def pictures(folder: str, count: int, place: str) -> list[str]:
    files = [f"{folder}/{i:05}.jpg" for i in range(count)]
    files[round(PLACES[place] * (count - 1))] = f"{folder}/needle.png"
    return files


def write_jamba(folder: Path) -> None:
    """The small checkpoint's decoder, as Transformers' Jamba reads it."""
    model: Any = AutoModelForImageTextToText.from_pretrained(longllava_hf.TINY)
    decoder = LongLLaVAForCausalLM(model.config.text_config)
    decoder.model.load_state_dict(model.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(model.lm_head.state_dict())
    decoder.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="jamba", architectures=["JambaForCausalLM"], use_mamba_kernels=False)
    (folder / "config.json").write_text(json.dumps(config))


def prompt_ids(processor: Any, count: int) -> torch.Tensor:
    image = f"<img>{'<image>' * processor.image_processor.image_seq_length}</img>\n"
    text = f"<|startoftext|><|User|>\n{image * count}{QUESTION}\n<|startoftext|><|Assistant|>\n"
    return torch.tensor([processor.tokenizer(text, add_special_tokens=False)["input_ids"]])


@torch.no_grad()
def ask_theirs(processor: Any, model: Any, jamba: Any, files: list[str]) -> str:
    """As one would with what Transformers has: everything at once, and no chunks, which its Jamba gets wrong."""
    own = processor.image_processor
    clip = CLIPImageProcessorPil(size=own.size, crop_size=own.crop_size)
    background = tuple(int(x * 255) for x in clip.image_mean)
    tensors = []
    for file in files:
        picture = Image.open(file).convert("RGB")
        side = max(picture.size)
        square = Image.new("RGB", (side, side), background)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        tensors.append(clip(square, return_tensors="pt")["pixel_values"])
    tower = model.model.vision_tower(torch.cat(tensors), output_hidden_states=True)
    patches = tower.hidden_states[model.config.vision_feature_layer][:, 1:]
    features = model.model.multi_modal_projector(pool_patches(patches, model.config.pooling_mode))
    ids = prompt_ids(processor, len(files))
    embeds = jamba.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == model.config.image_token_id).unsqueeze(-1), features.flatten(0, 1))
    cache = DynamicCache(config=jamba.config)
    output = jamba.generate(inputs_embeds=embeds, past_key_values=cache, max_new_tokens=3, do_sample=False)
    return processor.decode(output[0], skip_special_tokens=True).strip()


def ask_ours(processor: Any, model: Any, files: list[str], chunk: int | None) -> str:
    content = [*({"type": "image", "path": file} for file in files), {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"lazy": True},
    )
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False, prefill_chunk_size=chunk)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def measure(name: str, files: list[str], jamba_folder: str, chunk: int | None = None) -> tuple[str, float, int]:
    """Answer, seconds, and bytes beyond the loaded model."""
    processor = AutoProcessor.from_pretrained(longllava_hf.TINY)
    model: Any = AutoModelForImageTextToText.from_pretrained(longllava_hf.TINY).eval()
    if name == PEER:
        jamba: Any = JambaForCausalLM.from_pretrained(jamba_folder).eval()
        model.model.language_model, model.lm_head = torch.nn.Identity(), torch.nn.Identity()

    def run(files: list[str]) -> str:
        if name == PEER:
            return ask_theirs(processor, model, jamba, files)
        return ask_ours(processor, model, files, chunk)

    run(files[:2])  # what is loaded at the first call is not a picture's
    started = time.perf_counter()
    answer, extra = peak_of(lambda: run(files))
    return answer, time.perf_counter() - started, extra


def kept_bytes(count: int) -> int:
    """What must be kept of so many pictures: keys and values, token ids and their mask."""
    processor = AutoProcessor.from_pretrained(longllava_hf.TINY)
    text = longllava_hf.LongLLaVAConfig.from_pretrained(longllava_hf.TINY).text_config
    heads, width = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    a_token = 4 * 2 * text.layer_types.count("full_attention") * heads * width + 2 * 8
    return prompt_ids(processor, count).shape[1] * a_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10, 100, 500, 1000, 2000], help="with the peer")
    parser.add_argument("--alone", type=int, nargs="*", default=[5000], help="without it")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the picture")
    arguments = parser.parse_args()
    counts = [*arguments.images, *arguments.alone]
    rows: list[dict] = []
    unit = None
    with tempfile.TemporaryDirectory() as folder:
        digit = write_pictures(Path(folder), max(counts))
        jamba = Path(folder, "jamba")
        write_jamba(jamba)
        for count in counts:
            names = [PEER, "ours"] if count in arguments.images else ["ours"]
            results = {}
            for place in PLACES:
                for name in names if place == "start" else ["ours"]:
                    results[name, place] = run_apart(measure, name, pictures(folder, count, place), str(jamba))
            theirs = results.get((PEER, "start"), (None, None, None))[1]
            unit = unit or theirs
            for (name, place), (answer, seconds, extra) in results.items():
                rows.append(
                    {
                        "images": count,
                        "needle": place,
                        "with": name,
                        "right": answer == str(digit),
                        "times faster": theirs / seconds if theirs else None,
                        RELATIVE: seconds / unit if unit else None,
                        "extra MB": extra / 1e6,
                        "must keep MB": kept_bytes(count) / 1e6,
                    }
                )
            print(f"{count:,} images: measured", flush=True)
    print_table(rows)
    ours = {row["images"]: row for row in rows if row["with"] == "ours" and row["needle"] == "start"}
    few, many = ours[min(100, max(ours))], ours[max(arguments.images)]
    slopes = {}
    if many["images"] > few["images"]:
        for name in ("extra MB", "must keep MB"):
            slopes[name] = 1e3 * (many[name] - few[name]) / (many["images"] - few["images"])
        print(
            f"an image more costs {slopes['extra MB']:.1f} kB, of which {slopes['must keep MB']:.1f} kB must be kept"
        )
    written = write_json("images_cpu", {**machine(), "rows": rows, "kB an image": slopes}, arguments.output)
    panels: dict[str, dict] = {"extra MB": {}, RELATIVE: {}}
    for name in (PEER, "ours"):
        mine = [row for row in rows if row["with"] == name and row["needle"] == "start"]
        for label, lines in panels.items():
            lines[name] = ([row["images"] for row in mine], [row[label] for row in mine])
    picture = draw("images_cpu", "longllava-tiny on two CPU cores", "images", panels, arguments.output)
    print(f"written: {written}, {picture}")


if __name__ == "__main__":
    main()
