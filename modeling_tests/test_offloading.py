"""Weights that accelerate keeps elsewhere: on the CPU's side of a GPU, or on disk."""

import accelerate
import pytest
import torch

from longllava_hf import LongLLaVAContext, LongLLaVAForConditionalGeneration

from .test_generation_longllava import PICTURES, WITH_PICTURES


PARTS = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")


def offload(model, how: str, folder):
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if how == "disk_offload":
        return accelerate.disk_offload(model, str(folder / "offloaded"), execution_device="cpu")
    model.save_pretrained(folder / "model")
    if how == "all on disk":
        device_map = {"": "disk"}
    else:
        device_map = {part: "disk" if part.endswith(how) else "cpu" for part in PARTS}
    return LongLLaVAForConditionalGeneration.from_pretrained(
        folder / "model", device_map=device_map, offload_folder=str(folder / "offloaded")
    ).eval()


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "all on disk", "vision_tower", "language_model"])
@torch.no_grad()
def test_offloaded(small_model, tmp_path, how):
    expected = small_model(WITH_PICTURES, pixel_values=PICTURES).logits
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    said = torch.stack(small_model.generate(WITH_PICTURES, pixel_values=PICTURES, **options).logits)
    try:
        model = offload(small_model, how, tmp_path)
    except ValueError as error:
        if "offload the whole model to the disk" not in str(error):
            raise
        pytest.skip("this release of accelerate does not")
    torch.testing.assert_close(model(WITH_PICTURES, pixel_values=PICTURES).logits, expected)
    output = model.generate(WITH_PICTURES, pixel_values=PICTURES, **options)
    torch.testing.assert_close(torch.stack(output.logits), said, rtol=1e-4, atol=1e-4)
    model.prefill(WITH_PICTURES[:, :-2], PICTURES).save(tmp_path / "x", model)
    context = LongLLaVAContext.load(tmp_path / "x", model)
    assert not any(
        x.is_meta for layer in context.cache.layers for x in (getattr(layer, "keys", None),) if x is not None
    )
    output = model.generate(WITH_PICTURES[:, -2:], cache=context, **options)
    torch.testing.assert_close(torch.stack(output.logits), said, rtol=1e-4, atol=1e-4)
