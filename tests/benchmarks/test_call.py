"""The counter of launches, bytes and memory: what it must say, and that it counts what the CUDA sources launch."""

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

import erc
import erc.loss
from benchmarks.call import call_rows, calls, count, kernels_of
from benchmarks.host import STATIONS, host_rows
from erc.backend import operators as backend_operators
from erc.ops import SCHEMAS
from tests.contract.test_opcheck import operator_arguments, with_support
from tests.cuda_host import build

ROWS, LENGTH, VOCAB = 4, 64, 4096
LOGITS = ROWS * LENGTH * VOCAB * 2
PER_TOKEN = ROWS * LENGTH * 200  # bytes: generous for a table, outputs and inputs of a token, little beside its logits


@pytest.fixture(scope="module")
def costs():
    return {name: count(call) for name, call in calls(ROWS, LENGTH, VOCAB).items()}


def objectives(costs):
    return {name.split(": ")[1]: cost for name, cost in costs.items() if name.startswith("policy_loss and")}


def test_token_level_losses_take_six_launches_and_sequence_rules_at_most_forty(costs):
    assert costs["token_stats"].kernels == 1
    for name, cost in objectives(costs).items():
        rule = erc.objective(name).ratio
        if erc.objective(name).fused:
            assert cost.kernels == 6 and cost.ours == 5, name
        elif not rule.needs_batch:
            assert 6 < cost.kernels <= 40, name


def test_a_support_adds_two_launches(costs):
    plain, kept = costs["token_stats and backward"], costs["token_stats over a support and backward"]
    assert kept.kernels == kept.ours == plain.kernels + 2
    plain, kept = (
        costs["policy_loss and backward: erc-dapo"],
        costs["policy_loss over a support and backward: erc-dapo"],
    )
    assert kept.kernels == plain.kernels + 2 == 8 and kept.ours == plain.ours + 2
    assert 2 * LOGITS <= kept.bytes <= 2 * LOGITS + 12 * PER_TOKEN, "one read, one write, and what is of a token"
    assert kept.peak <= LOGITS + 4 * PER_TOKEN < 2 * LOGITS, "no mask of the vocabulary's size"
    plain, kept = costs["policy_loss and backward: gspo"], costs["policy_loss over a support and backward: gspo"]
    assert kept.kernels == plain.kernels + 2 and kept.ours == plain.ours + 2
    assert kept.bytes <= plain.bytes + 20 * PER_TOKEN and kept.peak <= LOGITS + 10 * PER_TOKEN


def test_logits_are_read_once_and_their_gradient_written_once(costs):
    for name, cost in objectives(costs).items():
        sweeps = 2 if erc.objective(name).fused else 3
        assert sweeps * LOGITS <= cost.bytes <= sweeps * LOGITS + 8 * PER_TOKEN, name
        assert LOGITS <= cost.peak <= LOGITS + 2 * PER_TOKEN, name
    assert costs["token_stats"].peak <= PER_TOKEN
    assert 5 * LOGITS <= costs["entropy_ratio and backward"].bytes <= 5 * LOGITS + 8 * PER_TOKEN


def test_what_a_caller_does_beside_is_counted():
    call = calls(ROWS, LENGTH, VOCAB)["token_stats"]
    plain = count(call)
    more = count(lambda: (call(), torch.empty(LOGITS, dtype=torch.uint8, device="meta").zero_()))
    assert more.kernels == plain.kernels + 1 and more.peak >= LOGITS and more.bytes >= plain.bytes + LOGITS


def test_objectives_of_one_cost_share_a_line():
    lines = [row[0] for row in call_rows(ROWS, LENGTH, VOCAB)]
    listed = {name.strip() for line in lines if ": " in line for name in line.split(": ")[1].split(",")}
    spelled = {whole for name in listed for whole in (name.replace("(erc-)", ""), name.replace("(erc-)", "erc-"))}
    assert spelled == set(erc.objectives())


@pytest.mark.skipif(build.compiler() is None, reason="needs g++")
@pytest.mark.parametrize("name", (*SCHEMAS, "policy_loss over a support", "policy_loss_ over a support"))
def test_launches_are_those_of_the_cuda_sources(name):
    host = build.load()
    name, over, _ = name.partition(" over")
    arguments = operator_arguments(name, host.ops)
    arguments = with_support(arguments) if over else arguments
    host.configure(clusters=False, multiprocessors=1)
    operator = getattr(host.ops, name)
    operator(*arguments)
    names = [argument.name for argument in operator.default._schema.arguments]
    assert len(host.launches()) == kernels_of(name, dict(zip(names, arguments, strict=False)))


def test_the_host_time_of_a_loss_is_that_of_its_stations():
    rows = {name: float(microseconds) for name, microseconds, _ in host_rows(calls=100)}
    assert set(STATIONS) < set(rows) and all(value > 0 for value in rows.values())
    assert rows["of it: operator"] <= rows["operator, autograd node"]
    stations = sum(rows[name] for name in STATIONS if not name.startswith("of it"))
    whole = rows["policy_loss and backward, whole"]
    assert 0.3 * whole < stations < 3 * whole, "the stations are the call, up to the noise of the machine"
    assert erc.loss.operators is backend_operators, "the wrappers are gone"
