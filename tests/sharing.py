"""Shared by the tests of shared weights."""

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_approx import SharingConfig
from models import batch


def attach(model, **options):
    method = SharingConfig(**options).build()
    method.attach(model)
    return method


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
