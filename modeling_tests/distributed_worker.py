"""
One of several processes that train a small model: `python -m modeling_tests.distributed_worker RANK WORLD PORT FOLDER WAY...`.
What each way of spreading the model computed is written to `FOLDER/WAY-RANK.json`.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from longllava_hf import LongLLaVAForConditionalGeneration

from .conftest import published, small_config


STEPS = 20
IMAGE_TOKEN = 5


def build() -> LongLLaVAForConditionalGeneration:
    """A model of 8 experts that sees 2 pictures at a time; its tower is frozen, as in the paper."""
    torch.manual_seed(0)
    text_config = {
        "num_experts": 8,
        "num_hidden_layers": 6,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.01,
    }
    model = LongLLaVAForConditionalGeneration(small_config(text_config=text_config, vision_batch_size=2))
    model.model.vision_tower.requires_grad_(False)
    return model.train()


def batch_of(step: int, rank: int) -> dict[str, torch.Tensor]:
    """
    Two rows. Over the steps: pictures on both ranks, on one of them, more than the tower sees at a time on one of them, and on
    none. Text rows have 3 tokens in all, which is too few for 8 experts.
    """
    generator = torch.Generator().manual_seed(1000 * rank + step)
    pictures = [(1, 2), (0, 1), (5, 0), (0, 0)][step % 4][(rank + step // 4) % 2]
    texts = torch.randint(10, 100, (1, 12 if pictures else 3), generator=generator)
    ids = torch.cat([torch.full((1, 4 * pictures), IMAGE_TOKEN), texts], dim=1)
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE_TOKEN, -100)}
    if pictures:
        batch["pixel_values"] = torch.randn(pictures, 3, 16, 16, generator=generator)
    return batch


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def train_alone(world: int) -> dict[str, list[list[float]]]:
    """What [`train`] and [`evaluate`] give on each rank, in one process. Without a gradient there are zeros, as with DDP."""
    model = build()
    optimizer, losses = optimizer_of(model), []
    for step in range(STEPS):
        of_ranks = [model(**batch_of(step, rank)).loss for rank in range(world)]
        sum(of_ranks).div(world).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append([loss.item() for loss in of_ranks])
    return {"losses": list(zip(*losses)), "eval": [evaluate(model, rank) for rank in range(world)]}


def train(model, optimizer, rank: int) -> list[float]:
    losses = []
    for step in range(STEPS):
        loss = model(**batch_of(step, rank)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def evaluate(model, rank: int) -> list[float]:
    """Losses of four steps without gradients, where ranks need one another's weights all the same."""
    model.eval()
    with torch.no_grad():
        return [model(**batch_of(step, rank)).loss.item() for step in range(4)]


def run_ddp(rank: int) -> dict:
    model = torch.nn.parallel.DistributedDataParallel(build())
    return {"losses": train(model, optimizer_of(model), rank), "eval": evaluate(model.module, rank)}


def run_fsdp2(rank: int) -> dict:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = build()
    for layer in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layers):
        fully_shard(layer)
    fully_shard(model)
    is_sharded = all(isinstance(p, DTensor) for p in model.parameters())
    return {"is_sharded": is_sharded, "losses": train(model, optimizer_of(model), rank), "eval": evaluate(model, rank)}


def zero3_config() -> dict:
    import deepspeed

    # Its own exchange between processes of one machine, which would be compiled first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    return {**config, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}


def run_zero3(rank: int) -> dict:
    import deepspeed

    config, model = zero3_config(), build()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
    is_sharded = all(hasattr(p, "ds_tensor") for p in model.parameters())
    losses = []
    for step in range(STEPS):
        loss = engine(**batch_of(step, rank)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return {"is_sharded": is_sharded, "losses": losses, "eval": evaluate(engine, rank)}


def run_zero3_load(rank: int) -> dict:
    """Checkpoints are read into parameters that are spread from the start: a native one, and one whose tower is elsewhere."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(zero3_config())
    is_sharded, differs = True, []
    for folder in (Path(sys.argv[4]) / "checkpoint", published("moe")):
        model = LongLLaVAForConditionalGeneration.from_pretrained(folder)
        is_sharded = is_sharded and all(hasattr(p, "ds_tensor") for p in model.parameters())
        expected = torch.load(Path(sys.argv[4]) / f"{folder.parent.name}.pt", weights_only=True)
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            state = model.state_dict()
            differs += [name for name in expected if not torch.equal(state[name], expected[name])]
    assert alive.is_zero3()
    return {"is_sharded": is_sharded, "differs": differs, "compared": len(state)}


def main() -> None:
    rank, world, port, folder, *ways = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo")
    for way in ways:
        result = globals()[f"run_{way}"](int(rank))
        (Path(folder) / f"{way}-{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
