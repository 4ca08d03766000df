"""Tiny random models of real architectures, and batches for them."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCAB = 48


def bert():
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config)


def gpt2():
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config)


def llama(vocab_size=VOCAB):
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def t5():
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def vit():
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=2,
    )
    return ViTForImageClassification(config)


def resnet():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
    return ResNetForImageClassification(config)


ARCHITECTURES = {"bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5, "vit": vit, "resnet": resnet}


def build(name, seed=0):
    torch.manual_seed(seed)
    return ARCHITECTURES[name]()


def uneven():
    """A BERT with large weights, of whose two layers the second adds next to nothing to what it is given."""
    model = build("bert").eval()
    with torch.no_grad():
        for layer, size in zip(model.bert.encoder.layer, (20.0, 1e-2), strict=True):
            for part in (layer.attention.output, layer.output):
                part.dense.weight.mul_(size)
            for part in (layer.attention.self.query, layer.attention.self.value, layer.intermediate.dense):
                part.weight.mul_(20.0)
        model.bert.pooler.dense.weight.mul_(10.0)
        model.classifier.weight.mul_(20.0)
    return model


def dataset(name, size=32, seed=0):
    """A list of examples: text for text models, images for the others."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(size):
        if name in ("vit", "resnet"):
            image = torch.randn(3, 16, 16, generator=generator)
            examples.append({"pixel_values": image, "labels": i % 2})
            continue
        ids = torch.randint(3, VOCAB, (8,), generator=generator)
        labels = i % 2 if name == "bert" else ids.clone()
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def batch(name):
    """Inputs for a forward pass."""
    examples = dataset(name, size=4, seed=1)
    key = "pixel_values" if name in ("vit", "resnet") else "input_ids"
    inputs = {key: torch.stack([e[key] for e in examples])}
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    return inputs
