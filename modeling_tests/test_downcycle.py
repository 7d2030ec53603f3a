"""Dense checkpoints of those with experts."""

import json
import math

import pytest
import torch
from transformers import AutoModelForImageTextToText

from longllava_hf.cli import main
from longllava_hf.training import downcycle as module
from longllava_hf.training.downcycle import downcycle, spherical_mean

from .conftest import published


def karcher_mean(vectors: torch.Tensor) -> torch.Tensor:
    """As its definition has it, on the vectors themselves: where their logarithms cancel."""
    units = vectors / vectors.norm(dim=1, keepdim=True)
    mean = units.mean(0)
    mean = mean / mean.norm()
    for _ in range(200):
        logarithms = []
        for unit in units:
            angle = torch.arccos((unit @ mean).clamp(-1, 1))
            across = unit - (unit @ mean) * mean
            logarithms.append(angle * across / across.norm())
        step = torch.stack(logarithms).mean(0)
        mean = torch.cos(step.norm()) * mean + torch.sin(step.norm()) * step / step.norm().clamp_min(1e-300)
    return mean * vectors.norm(dim=1).mean()


def test_spherical_mean():
    torch.manual_seed(0)
    vectors = torch.randn(5, 40, dtype=torch.float64) + 1
    shares = spherical_mean(vectors @ vectors.T)
    torch.testing.assert_close(shares @ vectors, karcher_mean(vectors), rtol=1e-9, atol=1e-9)
    # Of two it is the middle of the arc.
    one, two = vectors[:2] / vectors[:2].norm(dim=1, keepdim=True)
    angle = math.acos(float(one @ two))
    middle = (one + two) * math.sin(angle / 2) / math.sin(angle)
    shares = spherical_mean(torch.stack([one, two]) @ torch.stack([one, two]).T)
    torch.testing.assert_close(shares @ torch.stack([one, two]), middle)
    same = vectors[:1].expand(3, -1)
    torch.testing.assert_close(spherical_mean(same @ same.T) @ same, vectors[0])


@pytest.mark.parametrize("kind", ["native", "published"])
def test_what_becomes_of_experts(published_copy, tmp_path, monkeypatch, capsys, kind):
    source = published_copy("moe")
    experts = AutoModelForImageTextToText.from_pretrained(source)
    if kind == "native":
        experts.save_pretrained(source := tmp_path / "native")
    monkeypatch.setattr(module, "_SHARD_SIZE", 300_000)  # several files
    for number, (options, scale) in enumerate(
        (
            ([], 1),
            (["--expert", "2"], 1),
            (["--method", "arithmetic"], 1),
            (["--method", "spherical"], 1),
            (["--down-scale", "0.045"], 0.045),
        )
    ):
        target = tmp_path / str(number)
        assert main(["downcycle", str(source), str(target), *options]) == 0
        assert len(list(target.glob("model-*.safetensors"))) > 3 and (target / "config.json").is_file()
        dense = AutoModelForImageTextToText.from_pretrained(target)
        assert set(dense.config.text_config.layers_num_experts) == {1}
        for old, new in zip(experts.model.language_model.layers, dense.model.language_model.layers):
            if not hasattr(old.feed_forward, "experts"):
                assert torch.equal(old.feed_forward.up_proj.weight, new.feed_forward.up_proj.weight)
                continue
            count = old.feed_forward.experts.num_experts
            down = old.feed_forward.experts.down_proj.weight.unflatten(0, (count, -1))
            gates, ups = old.feed_forward.experts.gate_up_proj.weight.unflatten(0, (count, 2, -1)).unbind(1)
            for matrices, found, factor in (
                (gates, new.feed_forward.gate_proj.weight, 1),
                (ups, new.feed_forward.up_proj.weight, 1),
                (down, new.feed_forward.down_proj.weight, scale),
            ):
                if "arithmetic" in options:
                    wanted = matrices.mean(0)
                elif "spherical" in options:
                    wanted = karcher_mean(matrices.double().flatten(1)).view_as(found).float()
                else:
                    wanted = matrices[2 if "--expert" in options else 0]
                torch.testing.assert_close(found, wanted * factor, rtol=1e-5, atol=1e-6)
        assert torch.equal(dense.lm_head.weight, experts.lm_head.weight)
        assert torch.isfinite(dense(torch.tensor([[1, 2, 3]])).logits).all()


def test_what_cannot_be_done(published_copy, tmp_path, capsys):
    source = str(published_copy("moe"))
    (tmp_path / "there").mkdir()
    for command, message in (
        ([str(published("dense")), "x"], "has no experts"),
        ([source, str(tmp_path / "there")], "exists already"),
        ([source, str(tmp_path / "new"), "--expert", "4"], "`expert` must be from 0 to 3, but is 4"),
    ):
        assert main(["downcycle", *command]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="`method` must be"):
        downcycle(source, str(tmp_path / "new"), method="median")
    config = json.loads((published("moe") / "config.json").read_text())
    assert config["num_experts"] == 4 and not (tmp_path / "new").exists()
