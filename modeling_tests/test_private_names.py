"""That what is not public in the hosts is named in one file alone, `compat_longllava.py`, and is listed there."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import longllava_hf


SOURCE = Path(longllava_hf.__file__).parent
FILES = sorted(file for file in SOURCE.rglob("*.py") if file.name != "compat_longllava.py")

# What every model, quantiser, module or processor fills in, or reads, when it is written for its host.
CONTRACT = {
    # PreTrainedModel
    "_attn_implementation",
    "_can_compile_fullgraph",
    "_can_record_outputs",
    "_init_weights",
    "_is_stateful",
    "_keys_to_ignore_on_load_unexpected",
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_supports_attention_backend",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_sdpa",
    "_tp_plan",
    "_tied_weights_keys",
    # HfQuantizer
    "_dequantize",
    "_process_model_before_weight_loading",
    # PreTrainedModel, with which composite models build their parts
    "_from_config",
    # torch.nn.Module
    "_apply",
    # ProcessorMixin: Transformers and vLLM call it by this name
    "_get_num_multimodal_tokens",
}

# vLLM, in the two modules that it alone imports: what each multimodal model overrides or calls when it is written for
# vLLM, and the operators that the build for CPUs lacks.
VLLM = {
    "vllm.py": {
        "_apply_prompt_updates",
        "_call_hf_processor",
        "_get_dummy_images",
        "_get_dummy_videos",
        "_get_mm_fields_config",
        "_get_prompt_updates",
        "_mark_language_model",
        "_mark_tower_model",
    },
    "vllm_cpu.py": {"_C", "_custom_ops"},
}

# Names without an underscore that no documentation speaks of.
INTERNAL = {
    "LoadStateDictConfig",
    "LoadStateDictInfo",
    "OutputRecorder",
    "capture_outputs",
    "collected_tensors",
    "get_module_from_name",
    "materialize_tensors",
    "merge_with_config_defaults",
    "prepare_inputs_layout",
    "quantization_operation",
    "set_zero3_state",
    "should_convert_module",
    "text_replacement_offsets",
    "weight_mapping",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names() -> set[str]:
    """Private names that the package itself defines: functions, classes, variables, attributes."""
    names: set[str] = set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if getattr(node.value, "id", "") in ("self", "cls") else set()
    return names


OWN = own_names()


def hidden_names(file: Path) -> list[str]:
    """Lines of a file that name something that is not public in a host."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [part for part in (node.module or "").split(".") if is_private(part)]
            names += [a.name for a in node.names if is_private(a.name) or a.name in INTERNAL]
        elif isinstance(node, ast.Attribute):
            if (is_private(node.attr) and node.attr not in CONTRACT | OWN) or node.attr in INTERNAL:
                names = [node.attr]
        elif isinstance(node, ast.keyword) and node.arg and is_private(node.arg) and node.arg not in CONTRACT | OWN:
            names = [node.arg]
        elif isinstance(node, ast.FunctionDef) and node.name in INTERNAL:
            names = [node.name]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr", "vars"):
            if node.func.id == "vars" and not (node.args and getattr(node.args[0], "id", "") in ("self", "cls", "c")):  # type: ignore[attr-defined]
                names = ["vars"]
            for argument in node.args[1:2]:
                if isinstance(argument, ast.Constant) and is_private(str(argument.value)):
                    names += [] if argument.value in CONTRACT | OWN else [str(argument.value)]
        names = [name for name in names if name not in VLLM.get(file.name, ())]
        found += [f"{file.name}:{getattr(node, 'lineno', 0)}: {name}" for name in names]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_private_name_outside_one_file(file):
    assert hidden_names(file) == []


def modules() -> list:
    names = [m.name for m in pkgutil.iter_modules([str(SOURCE)]) if m.name.endswith("_longllava")]
    return [importlib.import_module(f"longllava_hf.{name}") for name in names if name != "compat_longllava"]


def test_no_private_method_of_a_host_is_overridden():
    found = set()
    for module in modules():
        for _, ours in inspect.getmembers(module, inspect.isclass):
            if ours.__module__ != module.__name__:
                continue
            hosts = [base for base in ours.__mro__ if not base.__module__.startswith("longllava_hf")]
            for name in vars(ours):
                if not is_private(name) or name in CONTRACT or name.startswith("_abc_") or name == "_backward_cls":
                    continue  # the last two are put there by Python and by torch
                if any(name in vars(host) for host in hosts):
                    found.add(f"{ours.__name__}.{name}")
    assert found == set()


def test_what_is_left_is_listed():
    """Each private name in the one file stands in the table of its docstring."""
    file = SOURCE / "compat_longllava.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    table = ast.get_docstring(tree) or ""
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    listed = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_private(node.attr)}
    assert [name for name in sorted(listed - own) if name not in table and not name.startswith("_CACHE")] == []
    public = ast.literal_eval(
        next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    )  # type: ignore[attr-defined]
    assert [name for name in public if f"`{name}`" not in table] == []
