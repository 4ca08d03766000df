"""`torch.compile` of a model at work: no more graphs than the model alone has, whatever schedules do."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from hf_approx import attach
from models import batch, build
from trajectories import CS, RUNS, SMOL

STEPS = 6
INPUTS = replace(SMOL, activations=True)
METHODS = {
    "no method": [],
    "masks": [CS],
    "noise, then rounded": [SMOL],
    "rounded": RUNS["smol, rounded"],
    "quantized inputs": [INPUTS],
    "quantized channels": [replace(INPUTS, activation_granularity="channel", unsigned_activations=["output.dense"])],
    "sharing": RUNS["sharing"],
    "masked layers": RUNS["layers, cs"],
    "masks and noise": RUNS["cs and smol"],
}


def losses(configs, compiled):
    """Of every step of a short training; and how many graphs there were after it."""
    torch._dynamo.reset()
    counters.clear()
    model = build("bert").train()
    # The model would note it at the end of its first forward pass, and be compiled twice.
    model.config.problem_type = "single_label_classification"
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    stack = attach(model, configs)
    optimizer = stack.bind(torch.optim.AdamW(stack.parameters(), lr=1e-3), steps=STEPS)
    graphs, found = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    called = torch.compile(model, backend=backend) if compiled else model
    for _ in range(STEPS):
        loss = called(**batch("bert"), labels=torch.tensor([0, 1, 0, 1])).loss
        found.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert stack.is_final
    return found, len(graphs)


@pytest.mark.parametrize("name", METHODS)
def test_one_graph_does_for_all_of_training(name):
    found, graphs = losses(METHODS[name], compiled=True)
    assert graphs == 1
    assert not counters["graph_break"]
    assert found == pytest.approx(losses(METHODS[name], compiled=False)[0], rel=1e-5)
