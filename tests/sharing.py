"""Shared by the tests of shared weights."""

import torch
from transformers import BertConfig, BertForSequenceClassification

from helpers import stacked
from hf_approx import SharingConfig
from models import batch


def attach(model, **options):
    """The method, at work on the model."""
    return stacked(model, SharingConfig(**options))[1]


def shared(model, **options):
    """The model, as it is after training or loading: its layers mix their weights in every forward pass."""
    stacked(model, SharingConfig(**options))[0].bake()
    return model


def deep_bert(layers=4):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=48,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def logits(model, name="bert"):
    with torch.no_grad():
        return model.eval()(**batch(name)).logits
