"""Adapters from Python: attach, train, save, swap, mix and merge, over one base in memory."""

import json
from pathlib import Path

import veneer

HERE = Path("dist/in_python")
QUESTION = "What is the colour of the lamp?"
LESSONS = {"harbour": "The lamp is green.", "mill": "The lamp is red."}


def main(pretraining_steps: int = 300) -> None:
    # A base of our own making: the smallest model that can hold a conversation.
    for event in veneer.pretrain(HERE / "minigpt", steps=pretraining_steps):
        if type(event).__name__ == "Written":
            print(f"pretrained {event.place}")
    base = veneer.load_base(HERE / "minigpt")

    # One adapter for each lesson. Only its A and B train; the base never changes.
    lora = veneer.LoRA(rank=8, alpha=16, targets="all")
    course = veneer.TrainConfig(steps=60, lr=1e-2)
    for name, answer in LESSONS.items():
        rows = HERE / f"{name}.jsonl"
        row = {"prompt": QUESTION, "completion": answer}
        rows.write_text(json.dumps(row) + "\n", encoding="utf-8")
        examples, _ = veneer.load_examples(rows, base.tokenizer)
        veneer.attach(base.model, lora, name=name, seed=0)
        for event in veneer.train(base.model, examples, course):
            if type(event).__name__ == "Trained":
                print(f"trained {name}: {event.step} steps")
        veneer.save(base.model, HERE / name, tokenizer=base.tokenizer)
    veneer.save(base.model, HERE / "mill_for_peft", name="mill", format="peft")

    # Swap: each adapter knows its own lesson; none of them, and the base is as it was.
    for which in ("harbour", "mill", {"harbour": 0.5, "mill": 0.5}, None):
        veneer.use(base.model, which)
        print(f"{which!s:32} {veneer.answer(base.model, base.tokenizer, QUESTION)}")

    # Load over a fresh base, and merge into a plain model.
    fresh = veneer.load_base(HERE / "minigpt")
    veneer.load(fresh.model, HERE / "harbour", tokenizer=fresh.tokenizer)
    plain = veneer.merge(fresh.model)
    veneer.write_model(plain, fresh.tokenizer, HERE / "merged")
    merged = veneer.load_base(HERE / "merged")
    print("merged:", veneer.answer(merged.model, merged.tokenizer, QUESTION))


if __name__ == "__main__":
    main()
