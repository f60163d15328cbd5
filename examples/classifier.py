"""A classifier that is no language model: BERT with an adapter, trained by transformers' Trainer.

The base is random here, so that nothing need be fetched; with a network it would be
`BertForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=3)`.
"""

import random
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import veneer

HERE = Path("dist/classifier")
COLOURS = ["green", "red", "blue"]
WORDS = [
    "[PAD]",
    "[CLS]",
    *COLOURS,
    *["the", "a", "lamp", "harbour", "mill", "ship", "is", "was", "old", "small", "near"],
]


def sentences(count: int, seed: int) -> list[dict]:
    """Return sentences of eight words, one of them a colour, which is the label."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices(WORDS[5:], k=8)
        label = draw.randrange(len(COLOURS))
        words[draw.randrange(8)] = COLOURS[label]
        ids = [WORDS.index(word) for word in ("[CLS]", *words)]
        rows.append({"input_ids": ids, "labels": label})
    return rows


def main(steps: int = 150) -> float:
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            num_labels=len(COLOURS),
        )
    )
    veneer.attach(model, veneer.LoRA(rank=8, targets="attention,mlp"), seed=0)
    # The last layer is random, so it trains whole, beside the adapter.
    model.classifier.requires_grad_(True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trained:,} of {model.num_parameters():,} parameters train")

    settings = TrainingArguments(
        str(HERE / "run"),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model=model, args=settings, train_dataset=sentences(2000, seed=1)).train()

    # Merged it is a plain classifier, its trained last layer included.
    veneer.merge(model).save_pretrained(HERE / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(HERE / "merged").eval()
    test = sentences(200, seed=2)
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([row["input_ids"] for row in test])).logits
    labels = torch.tensor([row["labels"] for row in test])
    right = float((logits.argmax(-1) == labels).float().mean())
    print(f"{right:.0%} of {len(test)} new sentences are classified rightly")
    return right


if __name__ == "__main__":
    main()
