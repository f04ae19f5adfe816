"""`python -m erc.triton_kernels.autotune`: measures the knobs of `tuning` on this GPU and prints lines for
`tuning.MEASURED`.

Run once by hand, never by a call: a call only looks its line up, so it neither waits for the GPU nor runs a kernel
twice over what it writes in place. The logits here are scratch, and the loss is the form that leaves them alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from erc.loss import policy_loss
from erc.results import PolicyLoss
from erc.triton_kernels import tuning

ROW_KIB = (64, 256, 304, 512)
PROGRAMS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
SPLITS = (0.0, 0.25, 0.5, 1.0)


def loss_call(rows: int, V: int, device: str) -> Callable[[], PolicyLoss]:
    """A call of the fused loss on bfloat16 logits."""
    logits = torch.randn(1, rows, V, dtype=torch.bfloat16, device=device)
    logits.requires_grad_()
    labels = torch.zeros(1, rows, dtype=torch.int64, device=device)
    ones = torch.ones(1, rows, device=device)
    return lambda: policy_loss(
        logits, labels, old_logprob=-ones, old_entropy=ones, advantages=ones, objective="erc-dapo", backend="triton"
    )


def best_tuning(
    V: int, rows: int, few_rows: int, seconds: Callable[[Callable[[], PolicyLoss]], float], device: str = "cuda"
) -> tuning.Tuning:
    """The fastest line at V: programs by a batch of `rows`, and the split by one of `few_rows` and of twice as many,
    which a good threshold treats differently. `seconds` times a call."""

    def time(call: Callable[[], PolicyLoss], line: tuning.Tuning) -> float:
        with tuning.override(line):
            return seconds(call)

    many = loss_call(rows, V, device)
    programs = min(PROGRAMS, key=lambda each: time(many, tuning.Tuning(each, 0.0)))
    few = [loss_call(count, V, device) for count in (few_rows, 2 * few_rows)]
    split = min(SPLITS, key=lambda each: sum(time(call, tuning.Tuning(programs, each)) for call in few))
    return tuning.Tuning(programs, split)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("autotune measures kernels on a GPU, and PyTorch finds none here: run it on the machine to be tuned")
    from triton.testing import do_bench

    device = tuning.device_of(torch.empty(0, device="cuda"))
    for kib in ROW_KIB:
        V = kib * 512
        rows, few = 16 * device.multiprocessors, device.multiprocessors // 4
        line = best_tuning(V, rows, few, lambda call: do_bench(call, return_mode="median"))
        print(
            f'    ("{device.architecture}", {kib}): Tuning({line.loss_programs:g}, {line.split_below:g}),', flush=True
        )


if __name__ == "__main__":
    main()
