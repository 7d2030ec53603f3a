"""A checkpoint that carries its code, where there is Transformers and nothing of this package."""

import json
import os
import site
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from longllava_hf import TINY
from longllava_hf.hub import AUTO_MAP, code_files, export_checkpoint


REPO_ID = "someone/longllava-tiny"
EXAMPLES = Path(__file__).parents[1] / "examples"
# What must not be needed.
ABSENT = ("longllava_hf", "av", "bitsandbytes", "mamba_ssm", "causal_conv1d", "accelerate", "peft")

CODE = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
name, examples, order, *absent = sys.argv[2:]
assert not [p for p in absent if importlib.util.find_spec(p)]
import torch, transformers
from transformers import AutoConfig, AutoProcessor, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

trust = {"trust_remote_code": True}
found = {}
names = ["AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM"]
if order == "processor first":
    processor = AutoProcessor.from_pretrained(name, **trust)
classes = {n: getattr(transformers, n).from_pretrained(name, **trust) for n in names if hasattr(transformers, n)}
found["classes"] = {n: type(model).__name__ for n, model in classes.items()}
found["config"] = type(AutoConfig.from_pretrained(name, **trust)).__name__
found["image_processor"] = type(AutoImageProcessor.from_pretrained(name, **trust)).__name__
if order != "processor first":
    processor = AutoProcessor.from_pretrained(name, **trust)
model = classes["AutoModelForImageTextToText"]
pictures = [{"type": "image", "url": f"{examples}/{n}.png"} for n in ("three", "seven")]
question = [{"type": "text", "text": "Which digit is the second picture?"}]
messages = [{"role": "user", "content": pictures + question}]
options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
for lazy in (False, True):
    inputs = processor.apply_chat_template(messages, **options, processor_kwargs={"lazy": lazy})
    output = model.generate(**inputs, max_new_tokens=4)
    found["lazy" if lazy else "eager"] = processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
inputs = processor.apply_chat_template(messages, **options)
found["logits"] = model(**inputs).logits[0, -1].double().tolist()
end = int((inputs["input_ids"][0] == processor.image_token_id).nonzero()[-1]) + 1
context = model.prefill(inputs["input_ids"][:, :end], inputs["pixel_values"])
context.save("film.ctx", model, processor)
context = type(context).load("film.ctx", model, processor)
output = model.generate(inputs["input_ids"][:, end:], cache=context.branch(), max_new_tokens=4)
found["context"] = processor.decode(output[0, inputs["input_ids"].shape[1] - end:], skip_special_tokens=True)
small = transformers.AutoModelForImageTextToText.from_pretrained(
    name, quantization_config={"quant_method": "longllava_int8"}, **trust
)
found["int8"] = str(small.model.language_model.layers[1].feed_forward.experts.down_proj.weight.dtype)
found["int8 logits"] = small(**inputs).logits[0, -1].double().tolist()
small.save_pretrained("small")
model.save_pretrained("again")
processor.save_pretrained("again")
again = transformers.AutoModelForImageTextToText.from_pretrained("again", **trust)
found["saved again"] = again(**inputs).logits[0, -1].double().tolist()
found["small again"] = transformers.AutoModelForImageTextToText.from_pretrained("small", **trust)(**inputs).logits[0, -1].double().tolist()
pipe = pipeline("image-text-to-text", model=name, **trust)
found["pipeline"] = pipe(text=messages, return_full_text=False)[0]["generated_text"]
json.dump(found, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return export_checkpoint(TINY, str(tmp_path_factory.mktemp("export") / "longllava-tiny"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """All installed packages but [`ABSENT`]."""
    folder = tmp_path_factory.mktemp("environment")
    for entry in Path(site.getsitepackages()[0]).iterdir():
        is_absent = entry.name.split("-")[0].split(".")[0] in ABSENT
        if not is_absent and not entry.name.startswith("__editable__") and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


def test_an_export_is_a_checkpoint_with_the_installed_code(exported):
    assert json.loads((exported / "config.json").read_text())["auto_map"] == AUTO_MAP
    for file in code_files():
        assert (exported / file.name).read_bytes() == file.read_bytes()
    assert {"modeling_longllava.py", "video_longllava.py", "files_longllava.py"} <= {f.name for f in code_files()}
    # Where the package is imported, its classes win, and nothing need be trusted.
    model = AutoModelForImageTextToText.from_pretrained(exported)
    assert type(model).__module__ == "longllava_hf.modeling_longllava"


def test_nothing_is_overwritten(exported):
    with pytest.raises(FileExistsError, match="exists already"):
        export_checkpoint(TINY, str(exported))


@pytest.mark.parametrize("order", ["model first", "processor first", "folder"])
def test_the_hub_code_needs_nothing_of_this_package(exported, environment, tmp_path, order):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / f"models--{REPO_ID.replace('/', '--')}"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).symlink_to(exported, target_is_directory=True)
    name = str(exported) if order == "folder" else REPO_ID
    (tmp_path / "run.py").write_text(CODE)
    arguments = [sys.executable, "-I", "-S", "run.py", str(environment), name, str(EXAMPLES), order, *ABSENT]
    variables = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for variable in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "PYTHONPATH"):
        variables.pop(variable, None)
    done = subprocess.run(
        arguments, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["classes"].values()) == {"LongLLaVAModel", "LongLLaVAForConditionalGeneration"}
    assert (found["config"], found["image_processor"]) == ("LongLLaVAConfig", "LongLLaVAImageProcessor")
    assert [found[way] for way in ("eager", "lazy", "context", "pipeline")] == ["7"] * 4
    assert found["int8"] == "torch.int8"
    logits, small = (torch.tensor(found[which]) for which in ("logits", "int8 logits"))
    assert torch.equal(torch.tensor(found["saved again"]), logits)
    assert torch.equal(torch.tensor(found["small again"]), small)
    assert torch.cosine_similarity(logits, small, dim=0) > 0.999
