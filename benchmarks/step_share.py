"""What share of a training step the loss is: a flop and byte model, so that nobody is promised more than they get.

Per token of the update, with P the parameters outside embedding and lm_head, D the width, L the layers, T the sequence
length, V the vocabulary, F the peak flops, B the memory bandwidth:

    backbone  = (6 P + 12 L D T / 2) / (F * MFU)          forward and backward, causal attention
    lm_head   = 6 D V / (F * MFU)                         three products: logits, grad hidden, grad weight
    loss      = bytes_per_logit * V / (B * efficiency)    everything between logits and their gradient
    old pass  = (2 P + 4 L D T / 2 + 2 D V) / (F * MFU) + stats_bytes * V / (B * efficiency)
                                                          log-probs and entropies of the rollout policy
    rollout   = rollout_ratio * (backbone + lm_head)      generation; measured ratios in RL are 1 to 4

`bytes_per_logit` counts every tensor as large as the logits once for each kernel that reads or writes it; launch gaps
and the second read of a two-sweep softmax are left out, in favour of the peers.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.hardware import GPU, GPUS


@dataclass(frozen=True)
class Model:
    """`params` without embedding and lm_head."""

    name: str
    params: float
    layers: int
    width: int
    vocab: int


@dataclass(frozen=True)
class LossTraffic:
    """Bytes per bfloat16 logit: of the loss with its gradient, and of the statistics of the old pass."""

    name: str
    loss_bytes: int
    stats_bytes: int
    how: str


MODELS = (
    Model("Qwen2.5-1.5B", 1.31e9, 28, 1536, 151_936),
    Model("Qwen2.5-7B", 6.53e9, 28, 3584, 152_064),
)
ACCELERATORS = tuple(gpu for gpu in GPUS if gpu.name != "A100")
H100 = ACCELERATORS[0]
TRAFFIC = (
    LossTraffic(
        "eager PyTorch",
        loss_bytes=60,
        stats_bytes=38,
        how="forward, and statistics: upcast 2+4, log_softmax 4+4, exp 4+4, product 8+4, sum 4; "
        "backward: zeros 4, log_softmax 8+4, cast 4+2",
    ),
    LossTraffic(
        "two fused passes", loss_bytes=6, stats_bytes=2, how="statistics read 2; backward reads 2 and writes 2"
    ),
    LossTraffic("erc", loss_bytes=4, stats_bytes=2, how="one read 2, one write 2"),
)


LENGTH, MFU, EFFICIENCY, ROLLOUT_RATIO = 4096, 0.4, 0.85, 2.0


@dataclass(frozen=True)
class StepShare:
    """Microseconds per token, and shares of the update alone and of the whole step."""

    model: str
    loss: str
    loss_us: float
    update_us: float
    step_us: float
    share_of_update: float
    share_of_step: float


def step_share(
    model: Model,
    traffic: LossTraffic,
    device: GPU = H100,
    *,
    length: int = LENGTH,
    mfu: float = MFU,
    efficiency: float = EFFICIENCY,
    rollout_ratio: float = ROLLOUT_RATIO,
) -> StepShare:
    """The model of this module's docstring.

    Args:
        length: T, prompt and response.
        mfu: share of the peak flops that the model's matrix products reach.
        efficiency: share of the data-sheet bandwidth that a streaming kernel reaches.
        rollout_ratio: time of generation over time of the update without the loss.
    """
    attention = model.layers * model.width * length / 2
    compute = device.flops * mfu
    stream = device.bandwidth * efficiency
    head = 6 * model.width * model.vocab / compute
    backbone = (6 * model.params + 12 * attention) / compute
    loss = traffic.loss_bytes * model.vocab / stream
    statistics = traffic.stats_bytes * model.vocab / stream
    old_pass = (2 * model.params + 4 * attention + 2 * model.width * model.vocab) / compute + statistics
    update = backbone + head + loss
    step = update + old_pass + rollout_ratio * (backbone + head)
    return StepShare(
        model.name, traffic.name, loss * 1e6, update * 1e6, step * 1e6, loss / update, (loss + statistics) / step
    )


HEADINGS = (
    "model",
    "loss",
    "loss, us",
    "update, us",
    "step, us",
    "loss / update",
    "loss and old statistics / step",
    "bytes per logit",
)


def step_share_rows(**assumptions: float) -> list[tuple[str, ...]]:
    """The model's answer for every model and loss, in the order of `HEADINGS`; times are per token."""
    rows = []
    for model in MODELS:
        for traffic in TRAFFIC:
            share = step_share(model, traffic, **assumptions)
            times = (f"{share.loss_us:.2f}", f"{share.update_us:.1f}", f"{share.step_us:.1f}")
            shares = (f"{100 * share.share_of_update:.1f} %", f"{100 * share.share_of_step:.1f} %")
            rows.append((model.name, traffic.name, *times, *shares, f"{traffic.loss_bytes} + {traffic.stats_bytes}"))
    return rows
