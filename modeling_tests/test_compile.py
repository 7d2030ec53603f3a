"""`torch.compile` of a model's `forward`: one graph for every token, however much was read before it."""

import pytest
import torch

from longllava_hf import LongLLaVAForConditionalGeneration

from .conftest import small_config


CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TOKENS = 40


@pytest.fixture
def model():
    torch.compiler.reset()
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    return LongLLaVAForConditionalGeneration(small_config(text_config=layers)).eval()


def compiled(model, **kwargs) -> list[int]:
    """Compile `forward`, without graph breaks; the list grows with each graph that is made."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph

    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True, **kwargs)
    return graphs


def prompt(rows: int = 1, images: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 100, (rows, 12), generator=generator)
    ids[:, 4 : 4 + 4 * images] = 5
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if rows > 1:  # padded on the left
        inputs["attention_mask"][1:, :3] = 0
    if images:
        inputs["pixel_values"] = torch.randn(rows * images, 3, 16, 16, generator=generator)
    return inputs


@pytest.mark.parametrize(
    "inputs, dynamic",
    [(prompt(), True), (prompt(rows=2), None), (prompt(images=1), None)],
    ids=["one row", "padded", "picture"],
)
def test_tokens_share_a_graph(model, inputs, dynamic):
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    options.update(output_logits=True, return_dict_in_generate=True)
    expected = model.generate(**inputs, **options)

    graphs, seen = compiled(model, dynamic=dynamic), []
    output = model.generate(**inputs, **options, logits_processor=[lambda _, x: (seen.append(len(graphs)), x)[1]])
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), **CLOSE)
    assert len(seen) == TOKENS and seen[4:] == [seen[4]] * (TOKENS - 4)
    assert seen[-1] <= 4


@torch.no_grad()
def test_compiled_and_eager_share_a_cache(model):
    """Each goes on from where the other was, a state made under `inference_mode` included, and contexts notice it."""
    inputs = prompt()
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"]], dim=1)
    expected, eager = model(ids, use_cache=False).logits, model.forward
    with torch.inference_mode():
        context = model.prefill(ids[:, :10])
    compiled(model)
    found = []
    for i in range(10, 24):
        forward = eager if i in (14, 15, 19) else model.forward
        found.append(forward(ids[:, i : i + 1], past_key_values=context.cache).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected[:, 10:], **CLOSE)
    with pytest.raises(ValueError, match="changed by something else"):
        context.check_unchanged()


def test_prompts_share_a_graph(model):
    """Of another length the second prompt makes lengths a variable, and the third makes nothing."""
    lengths = (12, 20, 33, 47)
    prompts = [torch.randint(6, 100, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
    with torch.no_grad():
        expected = [model(ids, use_cache=True).logits for ids in prompts]
        graphs, seen = compiled(model), []
        for ids, logits in zip(prompts, expected):
            torch.testing.assert_close(model(ids, use_cache=True).logits, logits, **CLOSE)
            seen.append(len(graphs))
    assert seen == [1, 2, 2, 2]


def export(model, is_grad_enabled: bool = False) -> torch.export.ExportedProgram:
    """The decoder without a cache, for any length from 8 on."""
    length = {1: torch.export.Dim("length", min=8, max=4096)}
    arguments = {"input_ids": prompt(rows=2)["input_ids"], "attention_mask": prompt(rows=2)["attention_mask"]}
    shapes = {"input_ids": length, "attention_mask": length, "use_cache": None}
    with torch.set_grad_enabled(is_grad_enabled):
        return torch.export.export(model, (), {**arguments, "use_cache": False}, dynamic_shapes=shapes, strict=False)


@torch.no_grad()
def test_export(model, tmp_path):
    torch.export.save(export(model), tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for length in (8, 31, 600):
        ids = torch.randint(6, 100, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        found, expected = exported(**inputs).logits, model(**inputs).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)
    with pytest.raises(AssertionError, match=r"size\(\)\[1\] >= 8"):
        exported(input_ids=ids[:, :5], attention_mask=mask[:, :5], use_cache=False)


def test_export_with_gradients_raises(model):
    """The loops of a scan that keeps what its backward pass needs are those of one length."""
    with pytest.raises(Exception, match="length"):
        export(model, is_grad_enabled=True)


@torch.no_grad()
def test_export_with_pictures_raises(model):
    """Whether there are as many image tokens as placeholders is asked of the ids, which a graph does not know."""
    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(model, (), {**prompt(images=1), "use_cache": False}, strict=False)


@torch.no_grad()
def test_export_with_a_cache_raises(model):
    with pytest.raises(Exception, match="LongLLaVACache"):
        torch.export.export(model, (), {"input_ids": prompt()["input_ids"], "use_cache": True}, strict=False)
