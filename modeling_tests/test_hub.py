"""
A checkpoint that carries its code and its card: pushed to a stand-in for the Hub, loaded by its repo id where there is
Transformers and nothing of this package.
"""

import json
import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText

from longllava_hf import TINY, LongLLaVAForConditionalGeneration
from longllava_hf.cli import main
from longllava_hf.hub import AUTO_MAP, cards, code_files, export_checkpoint, render_card
from longllava_hf.plan import MemoryPlanner, published_shape
from longllava_hf.verify import verify
from longllava_hf.video_longllava import VideoFile

from .hub_server import hub_server


REPO_ID = "someone/longllava-tiny"
EXAMPLES = Path(__file__).parents[1] / "examples"
# What must not be needed.
ABSENT = ("longllava_hf", "av", "bitsandbytes", "mamba_ssm", "causal_conv1d", "accelerate", "peft")

CODE = """
import importlib.util, json, sys
packages, name, examples, order, *absent = sys.argv[1:]
sys.path += packages.split()
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
frames = [f"frames/{n:02}.png" for n in range(64)]
film = [{"type": "video", "video": frames}, {"type": "text", "text": "Which digit appears in this film?"}]
film = [{"role": "user", "content": film}]
options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
for way, about, lazy in (("eager", messages, False), ("lazy", messages, True), ("film", film, False)):
    inputs = processor.apply_chat_template(about, **options, processor_kwargs={"lazy": lazy})
    output = model.generate(**inputs, max_new_tokens=4)
    found[way] = processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
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
    return export_checkpoint(TINY, str(tmp_path_factory.mktemp("export") / "longllava-tiny"), card="longllava-tiny")


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> list[str]:
    """
    How to start a Python that has Transformers and none of [`ABSENT`], and where its packages are: one that was made for it
    (`scripts/hub_environment.sh`), or this one, with the other packages that are installed.
    """
    if interpreter := os.environ.get("LONGLLAVA_HUB_PYTHON"):
        return [interpreter, "-I", "run.py", ""]
    folder = tmp_path_factory.mktemp("environment")
    for entry in Path(site.getsitepackages()[0]).iterdir():
        is_absent = entry.name.split("-")[0].split(".")[0] in ABSENT
        if not is_absent and not entry.name.startswith("__editable__") and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return [sys.executable, "-I", "-S", "run.py", str(folder)]


def push(hub, folder: Path, *options: str, repo_id: str = REPO_ID) -> subprocess.CompletedProcess:
    variables = {**hub.variables, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "longllava_hf.cli", "hub", "push", str(folder), repo_id, *options]
    return subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def hub(exported):
    """A Hub to which the checkpoint was pushed, and what the command said."""
    with hub_server() as hub:
        hub.variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
        done = push(hub, exported, "--private")
        assert done.returncode == 0, done.stderr[-3000:]
        hub.said = done.stdout
        yield hub


def run(python: list[str], code: str, arguments: list[str], folder: Path, **variables: str):
    (folder / "run.py").write_text(code)
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", **variables}
    for variable in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "PYTHONPATH"):
        environment.pop(variable, None)
    command = [*python, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_an_export_is_a_checkpoint_with_the_installed_code(exported):
    assert json.loads((exported / "config.json").read_text())["auto_map"] == AUTO_MAP
    for file in code_files():
        assert (exported / file.name).read_bytes() == file.read_bytes()
    assert {"modeling_longllava.py", "video_longllava.py", "files_longllava.py"} <= {f.name for f in code_files()}
    # Where the package is imported, its classes win, and nothing need be trusted.
    model = AutoModelForImageTextToText.from_pretrained(exported)
    assert type(model).__module__ == "longllava_hf.modeling_longllava"


def test_nothing_is_overwritten(exported, tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        export_checkpoint(TINY, str(exported))
    # Nor is the card of a checkpoint that has one.
    source = shutil.copytree(TINY, tmp_path / "source")
    (source / "README.md").write_text("mine")
    # What else lies beside weights that were trained is for nobody else.
    for name in ("optimizer.pt", "training_args.bin", "old_longllava.py", "trainer_state.json"):
        (source / name).write_text("{}")
    kept = export_checkpoint(str(source), str(tmp_path / "kept"))
    assert (kept / "README.md").read_text() == "mine"
    assert {file.name for file in kept.iterdir()} == {file.name for file in exported.iterdir()}


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "longllava_int8"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}]
)
def test_quantised_checkpoints_are_exported_as_they_are(tmp_path, quantization):
    if quantization["quant_method"] == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    small = LongLLaVAForConditionalGeneration.from_pretrained(TINY, quantization_config=quantization)
    source = shutil.copytree(TINY, tmp_path / "source", ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    small.save_pretrained(source)
    exported = export_checkpoint(str(source), str(tmp_path / "exported"))
    assert verify(exported)["problems"] == verify(exported)["without a place"] == []
    again = LongLLaVAForConditionalGeneration.from_pretrained(exported)
    assert again.state_dict().keys() == small.state_dict().keys()
    for name, tensor in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_push_puts_everything_on_the_hub_and_pins_it(exported, hub):
    weights, pinned = hub.files(REPO_ID)[1], hub.commits[REPO_ID][1][0]
    assert [len(files) for _, files in hub.commits[REPO_ID]] == [0, len(weights) - 1, len(weights)]
    assert hub.said == f"Pushed {REPO_ID}, revision {pinned}\n" and hub.private[REPO_ID]
    assert weights.keys() == {file.name for file in exported.iterdir()}
    for name, content in weights.items():
        if name != "README.md":
            assert content == (exported / name).read_bytes(), name
    assert f'checkpoint, revision = "{REPO_ID}", "{pinned}"\n' in weights["README.md"].decode()


def test_what_is_not_pushed(exported, tmp_path, capsys):
    assert main(["hub", "push", TINY, REPO_ID]) == 2
    assert "carries no code" in capsys.readouterr().err
    damaged = shutil.copytree(exported, tmp_path / "damaged")
    os.truncate(damaged / "model.safetensors", 1 << 20)
    assert main(["hub", "push", str(damaged), REPO_ID]) == 2
    assert "is not pushed" in capsys.readouterr().err
    # As the package saves again what was exported: `auto_map`, and nothing that it leads to.
    (damaged / "modeling_longllava.py").unlink()
    assert main(["hub", "push", str(damaged), REPO_ID]) == 2
    assert "such as `modeling_longllava.py`" in capsys.readouterr().err


def test_a_push_replaces_what_was_there(exported, hub, tmp_path):
    """Also where that had other files; cards that were pinned before, and a repository that is not private."""
    repo_id = "someone/again"
    whole = shutil.copytree(exported, tmp_path / "whole")
    quick_start = 'checkpoint, revision = "someone/old", "' + "b" * 40 + '"'
    (whole / "README.md").write_text(f"mine\n{quick_start}\n")
    assert push(hub, whole, repo_id=repo_id).returncode == 0
    pinned, before = hub.commits[repo_id][1]
    assert hub.files(repo_id)[1]["README.md"].decode() == f'mine\ncheckpoint, revision = "{repo_id}", "{pinned}"\n'

    sharded = shutil.copytree(exported, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    LongLLaVAForConditionalGeneration.from_pretrained(TINY).save_pretrained(tmp_path / "shards", max_shard_size="3MB")
    for file in (tmp_path / "shards").glob("*.safetensors*"):
        shutil.copyfile(file, sharded / file.name)
    hub.commits[repo_id].append(("c" * 40, {**before, "old_longllava.py": b""}))
    done = push(hub, sharded, repo_id=repo_id)
    assert done.returncode == 0, done.stderr[-3000:]
    assert hub.files(repo_id)[1].keys() == {file.name for file in sharded.iterdir()}

    commits = len(hub.commits[repo_id])
    done = push(hub, sharded, "--private", repo_id=repo_id)
    assert done.returncode == 2 and "exists and is public" in done.stderr
    assert len(hub.commits[repo_id]) == commits


@pytest.mark.parametrize("order", ["model first", "processor first", "folder"])
def test_the_hub_code_needs_nothing_of_this_package(exported, hub, python, tmp_path, order):
    """From the cache that a download of the repository left, and from a folder."""
    if order != "folder":
        download = (
            f"import json; from huggingface_hub import snapshot_download; snapshot_download({REPO_ID!r});"
            " json.dump({}, open('found.json', 'w'))"
        )
        run([sys.executable, "run.py"], download, [], tmp_path, **{**hub.variables, "HF_HUB_OFFLINE": "0"})
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(VideoFile(EXAMPLES / "film.mp4")):
        frame.save(tmp_path / "frames" / f"{number:02}.png")
    name = str(exported) if order == "folder" else REPO_ID
    found = run(python, CODE, [name, str(EXAMPLES), order, *ABSENT], tmp_path)
    assert set(found["classes"].values()) == {"LongLLaVAModel", "LongLLaVAForConditionalGeneration"}
    assert (found["config"], found["image_processor"]) == ("LongLLaVAConfig", "LongLLaVAImageProcessor")
    assert [found[way] for way in ("eager", "lazy", "context", "pipeline")] == ["7"] * 4
    assert found["film"] == "5"
    assert found["int8"] == "torch.int8"
    logits, small = (torch.tensor(found[which]) for which in ("logits", "int8 logits"))
    assert torch.equal(torch.tensor(found["saved again"]), logits)
    assert torch.equal(torch.tensor(found["small again"]), small)
    assert torch.cosine_similarity(logits, small, dim=0) > 0.999


def test_the_quick_start_of_a_pushed_card_runs(hub, python, tmp_path):
    """Downloaded file by file from the pinned commit, which is not the last one."""
    card = ModelCard(hub.files(REPO_ID)[1]["README.md"].decode())
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    shutil.copyfile(EXAMPLES / "seven.png", tmp_path / "picture.png")
    code = f"import json, sys\nsys.path += sys.argv[1].split()\n{code}\njson.dump(processor.decode(output[0]), open('found.json', 'w'))"
    answer = run(python, code, [], tmp_path, **{**hub.variables, "HF_HUB_OFFLINE": "0"})
    assert answer.split()[-1].startswith("7"), answer
    pinned = hub.commits[REPO_ID][1][0]
    snapshots = tmp_path / "home" / "hub" / f"models--{REPO_ID.replace('/', '--')}" / "snapshots"
    assert [snapshot.name for snapshot in snapshots.iterdir()] == [pinned] != [hub.files(REPO_ID)[0]]


def test_the_card_of_the_small_checkpoint(exported):
    card = ModelCard.load(exported / "README.md")
    data = card.data.to_dict()
    assert {k: data[k] for k in ("license", "library_name", "pipeline_tag", "metrics", "language")} == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "metrics": ["accuracy"],
        "language": "en",
    }
    results = json.loads(Path(TINY, "results.json").read_text())
    assert {result.dataset_name: result.metric_value for result in card.data.eval_results} == results
    (row,) = re.findall(r"^\| int8 \|(.*)\|$", card.text, re.MULTILINE)
    plan = MemoryPlanner(LongLLaVAForConditionalGeneration.config_class.from_pretrained(TINY), "int8", torch.float32)
    assert float(row.split("|")[1]) == pytest.approx(plan.plan(1000).total / 1e9, rel=5e-3)


@pytest.mark.parametrize(
    ("card", "shape", "milebench"), [("LongLLaVA-9B", "9b", 53.2), ("LongLLaVA-53B-A13B", "53b", 59.2)]
)
def test_the_cards_of_the_published_checkpoints(tmp_path, card, shape, milebench):
    config = published_shape(shape)
    config.save_pretrained(tmp_path)
    rendered = render_card(tmp_path, card)
    data = rendered.data
    assert data.base_model == f"FreedomIntelligence/{card}" and data.library_name == "transformers"
    assert data.license == "other" and data.license_name and data.license_link.endswith(card)
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) for dataset in data.datasets)
    assert {result.dataset_name: result.metric_value for result in data.eval_results}["MileBench"] == milebench
    assert all(result.source_url for result in data.eval_results)
    (row,) = re.findall(r"^\| int8 \|(.*)\|$", rendered.text, re.MULTILINE)
    assert float(row.split("|")[1]) == pytest.approx(MemoryPlanner(config, "int8").plan(1000).total / 1e9, rel=5e-3)
    # What a reader of the file finds is what was rendered.
    assert ModelCard(str(rendered)).data.to_dict() == data.to_dict()
    assert "{{" not in rendered.text and "{%" not in rendered.text


def test_cards_of_ones_own(tmp_path):
    assert cards() == ["LongLLaVA-53B-A13B", "LongLLaVA-9B", "longllava-tiny"]
    (tmp_path / "card.json").write_text('{"license": "mit", "description": "Reads meters."}')
    rendered = render_card(TINY, str(tmp_path / "card.json"))
    assert rendered.data.license == "mit" and "Reads meters." in rendered.text and rendered.data.eval_results
    (tmp_path / "card.json").write_text('{"question": "What does \\"STOP\\" mean?"}')
    (code,) = re.findall(r"```python\n(.*?)```", render_card(TINY, str(tmp_path / "card.json")).text, re.DOTALL)
    compile(code, "card", "exec")
    for card, message in {
        '{"licence": "mit"}': "has the key 'licence'",
        "mit": "is not JSON",
        "[]": "must be a JSON object, but is a list",
        '{"limits": 3}': "'limits' in .* must be like",
        '{"datasets": [3]}': "'datasets' in .* must be like",
        '{"results": {"meters": "97 %"}}': "The result 'meters' in .* must be a number",
    }.items():
        (tmp_path / "card.json").write_text(card)
        with pytest.raises(ValueError, match=message):
            render_card(TINY, str(tmp_path / "card.json"))
    # Before anything is converted.
    source = shutil.copytree(TINY, tmp_path / "source", ignore=shutil.ignore_patterns("*.safetensors"))
    (source / "results.json").write_text('{"results": {"mmlu": {"acc": 0.5}}}')
    with pytest.raises(ValueError, match=r"The result 'results' in .* must be a number"):
        export_checkpoint(str(source), str(tmp_path / "exported"))
    with pytest.raises(FileNotFoundError, match="expected one of LongLLaVA-53B-A13B"):
        export_checkpoint(TINY, str(tmp_path / "exported"), card="longllava-9b")
    assert not (tmp_path / "exported").exists()
