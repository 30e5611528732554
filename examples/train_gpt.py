"""Trains a small byte-level GPT on the text of Python's standard library, and prints every loss.

    python examples/train_gpt.py
    torchrun --nproc-per-node 2 examples/train_gpt.py --hex
    mpirun -n 2 python examples/train_gpt.py --hex

With --hex the losses are printed to the last bit, so that runs can be compared: the same number of ranks
gives the same bits under every launcher. With --run-dir it can be stopped (Ctrl-C, SIGTERM) and goes on when
started again.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch.utils.data import DataLoader

import mlsys_engine as mls


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--global-batch", type=int, default=24, help="samples of one step over all ranks")
    parser.add_argument("--accumulate", type=int, default=1, help="microbatches of a rank's share")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--hex", action="store_true", help="print losses as hexadecimal floats, to the last bit"
    )
    parser.add_argument("--losses", metavar="FILE", help="also append the printed lines to a file")
    parser.add_argument(
        "--run-dir", help="where record and checkpoints go (default: a new folder below runs/)"
    )
    parser.add_argument("--save-every", type=int, help="optimizer steps between checkpoints")
    return parser.parse_args()


class PrintLosses:
    """A callback: its methods are named after events and take those of their arguments that they need."""

    def __init__(self, options: argparse.Namespace, is_first_rank: bool) -> None:
        self.options, self.is_first_rank = options, is_first_rank

    def on_step_end(self, step: int, result: mls.StepResult) -> None:
        if not self.is_first_rank:
            return
        loss = result.loss.item()
        line = f"step {step} loss {loss.hex() if self.options.hex else f'{loss:.6f}'}"
        print(line, flush=True)
        if self.options.losses:
            with open(self.options.losses, "a", encoding="utf-8") as file:
                print(line, file=file)


def main() -> None:
    options = parse_arguments()
    world = mls.init()
    corpus = mls.data.stdlib_corpus(max_bytes=1 << 20)
    samples = mls.data.TokenDataset(corpus.train, context_length=63)  # windows of 64 bytes, labels included
    torch.manual_seed(options.seed)
    model = mls.models.GPT(
        mls.models.GPTConfig(context_length=64, num_layers=2, width=64, dropout=options.dropout)
    )
    trainer = mls.Trainer(
        model,
        optimizer=partial(mls.optim.AdamW, lr=3e-3),
        max_grad_norm=1.0,
        accumulate=options.accumulate,
        callbacks=[PrintLosses(options, world.rank == 0)],
        run_dir=options.run_dir,
        seed=options.seed,
    )
    loader = DataLoader(samples, batch_size=options.global_batch, shuffle=True)
    trainer.fit(loader, max_steps=options.steps, save_every=options.save_every)


if __name__ == "__main__":
    main()
