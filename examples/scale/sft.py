"""Train Veneer's adapter with TRL's SFTTrainer, in as many processes as `accelerate launch` starts.

    accelerate launch --config_file examples/scale/accelerate-ddp.yaml \
        examples/scale/sft.py MODEL DATA OUT

DATA has JSON lines with a prompt and a completion. OUT/adapter is what `veneer.load` and PEFT take.
"""

import argparse

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import veneer


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an adapter with SFTTrainer.")
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=-1, help="steps instead of one epoch")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step in each process")
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--resume", action="store_true")
    flags = parser.parse_args()

    base = veneer.load_base(flags.model)
    veneer.attach(base.model, veneer.LoRA(rank=flags.rank, targets="all"), seed=0)
    trainer = SFTTrainer(
        model=base.model,
        args=SFTConfig(
            flags.out,
            learning_rate=2e-4,
            num_train_epochs=1,
            max_steps=flags.steps,
            per_device_train_batch_size=flags.rows,
            save_steps=flags.save_every,
            ddp_find_unused_parameters=False,  # every adapter is used in every pass
            bf16=not flags.cpu,
            use_cpu=flags.cpu,
            report_to=[],
        ),
        train_dataset=load_dataset("json", data_files=flags.data, split="train"),
        processing_class=base.tokenizer,
        callbacks=[veneer.SaveAdapter(format="peft")],
    )
    trainer.train(resume_from_checkpoint=flags.resume or None)


if __name__ == "__main__":
    main()
