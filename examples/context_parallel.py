"""Train on sequences that no process holds as a whole: FSDP2 for the parameters, context parallelism for the tokens.

    torchrun --nproc-per-node 2 examples/context_parallel.py --tokens 32768

trains a small language model on English text (Python's own documentation) and prints loss and tokens per second. Without torchrun it
trains the same model in one process. On GPUs replace "gloo" by "nccl" and move the model to its device.
"""

from __future__ import annotations

import argparse
import os
import pydoc_data.topics
import time

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from miras_kernels.hf import MirasConfig, MirasForCausalLM
from miras_kernels.parallel import ContextParallel, parallelize

TEXT = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of a sequence, all ranks together")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--parts", type=int, default=8, help="parts that the heads are cut into")
    args = parser.parse_args()

    if "RANK" not in os.environ:  # not started by torchrun
        os.environ |= dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="29512")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("context",))
    context = ContextParallel(mesh["context"], chunk_size=64, parts=args.parts)

    torch.manual_seed(0)  # the same parameters everywhere
    config = MirasConfig(vocab_size=256, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
                         num_key_value_heads=8, preset="huber", max_position_embeddings=args.tokens)  # fmt: skip
    model = parallelize(MirasForCausalLM(config), context)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(args.steps):
        begin = int(torch.randint(len(TEXT) - args.tokens - 1, (), generator=torch.Generator().manual_seed(step)))
        text = TEXT[begin : begin + args.tokens + 1][None]
        ids, next_ids, positions = (context.shard(x) for x in (text[:, :-1], text[:, 1:], torch.arange(args.tokens)[None]))
        began = time.perf_counter()
        logits = model(input_ids=ids, position_ids=positions).logits
        # FSDP averages gradients over the ranks; the sum over all tokens is their number times this mean
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), next_ids.flatten(), reduction="sum") / args.tokens
        (loss * context.size).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        distributed.all_reduce(loss)
        seconds = time.perf_counter() - began
        if context.rank == 0:
            print(f"step {step}  loss {loss:.3f}  {args.tokens / seconds:,.0f} tokens/s", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
