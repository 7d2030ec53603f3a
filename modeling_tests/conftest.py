"""What several test files share. Nothing here or in them needs the network."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each take all cores wait for one another most of the time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


if not torch.cuda.is_available():
    # Read when a kernel is defined: without a GPU they are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"

import longllava_hf
from longllava_hf import LongLLaVAConfig, LongLLaVAForConditionalGeneration


FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ("moe", "dense")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("hub") and os.environ.get("HF_HUB_OFFLINE") == "1":
            item.add_marker(pytest.mark.skip(reason="HF_HUB_OFFLINE=1"))


def published(kind: str) -> Path:
    """A checkpoint as the authors' code writes it, with the tower's folder beside it."""
    return FIXTURES / f"longllava-{kind}-tiny" / "checkpoint"


def golden(kind: str) -> dict[str, np.ndarray]:
    """What the authors' code computes with it."""
    return dict(np.load(FIXTURES / f"longllava-{kind}-tiny" / "golden.npz"))


def golden_images(kind: str) -> list[str]:
    return [str(FIXTURES / f"longllava-{kind}-tiny" / f"image_{i}.png") for i in range(5)]


@pytest.fixture
def published_copy(tmp_path):
    """A function that copies a published checkpoint, tower and tokenizer included, to a folder to be changed."""

    def copy(kind: str = "moe") -> Path:
        root = tmp_path / f"published-{kind}"
        shutil.copytree(published(kind).parent, root)
        for file in (FIXTURES / "jamba-tokenizer").iterdir():
            shutil.copy(file, root / "checkpoint")
        return root / "checkpoint"

    return copy


@pytest.fixture(scope="session")
def processor(tmp_path_factory):
    """The processor of a published folder: Jamba's tokenizer, pictures of 336 pixels."""
    from transformers import AutoProcessor

    root = tmp_path_factory.mktemp("processor")
    shutil.copytree(published("moe").parent, root / "published")
    for file in (FIXTURES / "jamba-tokenizer").iterdir():
        shutil.copy(file, root / "published" / "checkpoint")
    return AutoProcessor.from_pretrained(root / "published" / "checkpoint")


@pytest.fixture(scope="session")
def tiny_processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(longllava_hf.TINY)


@pytest.fixture(scope="session")
def tiny_model():
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(longllava_hf.TINY).eval()


def free_port() -> int:
    """Of this machine, free a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def small_config(**kwargs) -> LongLLaVAConfig:
    """A random model that is quick to run: 8 layers, 4 experts, 4 tokens a picture."""
    text = {
        "vocab_size": 120,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "mamba_d_state": 4,
        "initializer_range": 0.1,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "projection_dim": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    text.update(kwargs.pop("text_config", {}))
    vision.update(kwargs.pop("vision_config", {}))
    return LongLLaVAConfig(text_config=text, vision_config=vision, **{"image_token_id": 5, **kwargs})


@pytest.fixture
def small_model() -> LongLLaVAForConditionalGeneration:
    torch.manual_seed(0)
    return LongLLaVAForConditionalGeneration(small_config()).eval()


@pytest.fixture
def film(tmp_path):
    """A function that writes a video of frames whose grey level tells their number, 10 a second."""

    def write(frames: int = 40, name: str = "film.mp4", size: tuple[int, int] = (64, 48), gop: int = 10) -> Path:
        av = pytest.importorskip("av")
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", gop
            stream.bit_rate = 2_000_000
            for i in range(frames):
                image = Image.new("RGB", size, (5 * i + 20,) * 3)
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
            container.mux(stream.encode())
        return path

    return write


def expert_matrix(weights, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's matrix `(rows, columns)` of [`ExpertWeights`], dequantised."""
    if hasattr(weights.weight, "matrix"):
        return weights.weight.matrix(expert, dtype)
    matrix = weights.weight[expert].to(dtype)
    return matrix if weights.scale is None else matrix * weights.scale[expert, :, None].to(dtype)
