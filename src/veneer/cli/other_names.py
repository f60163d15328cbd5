"""What PEFT, TRL, mlx-lm, Axolotl, Unsloth and LLaMA-Factory call the flags of Veneer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import takewhile

# Our flag, perhaps with its value, and the names that others have for it.
OTHERS = {
    "lr": "learning_rate lora_lr",
    "schedule": "lr_scheduler_type lr_scheduler lr_schedule scheduler",
    "warmup": "warmup_steps warmup_ratio num_warmup_steps",
    "epochs": "num_epochs num_train_epochs n_epochs max_epochs",
    "steps": "iters max_steps max_iters num_steps iterations",
    "clip": "max_grad_norm grad_clip gradient_clip gradient_clipping clip_grad_norm",
    "optimizer": "optim optimizer_type",
    "rank": "lora_r lora_rank r lora_dim",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules lora_target lora_target_modules lora_targets target_parameters",
    "layers": "layers_to_transform num_layers lora_layers",
    "dora": "use_dora lora_use_dora peft_use_dora",
    "rslora": "use_rslora lora_use_rslora peft_use_rslora",
    "lora_plus_ratio": "loraplus_lr_ratio lora_plus_lr_ratio",
    "init": "init_lora_weights peft_init_lora_weights",
    "max_length": "max_seq_length max_seq_len sequence_len seq_length cutoff_len model_max_length",
    "tokens_per_batch": "batch_size train_batch_size per_device_train_batch_size micro_batch_size "
    "per_device_batch_size",
    "tokens_per_step": "gradient_accumulation_steps gradient_accumulation grad_accumulation_steps "
    "grad_accum",
    "recompute full": "gradient_checkpointing grad_checkpoint use_gradient_checkpointing",
    "context_parallel": "context_parallel_size context_parallel_degree cp_size context_processes",
    "seed": "random_state random_seed data_seed",
    "save_every": "save_steps",
    "eval_every": "eval_steps steps_per_eval",
    "eval_rows": "val_set_size eval_size val_size",
    "eval_data": "eval_file val_file validation_file eval_dataset",
    "patience": "early_stopping_patience",
    "limit": "max_samples max_train_samples",
    "new_words": "new_tokens add_tokens",
    "bits 4": "load_in_4bit",
    "bits 8": "load_in_8bit",
    "bits": "quantization_bit",
    "dtype": "torch_dtype",
    "dtype bf16": "bf16",
    "method": "fine_tune_type finetuning_type train_type",
    "virtual_tokens": "num_virtual_tokens",
    "model": "model_name_or_path model_name base_model model_id",
    "data": "dataset dataset_name dataset_path train_file train_data data_path datasets",
    "out": "output_dir adapter_path save_path save_dir",
    "resume": "resume_from_checkpoint",
    "track": "report_to",
}
# What tune has once and compare, which trains in many ways with one budget, has of its own.
OF_COMPARE = {
    "lr": "lr.lora",
    "rank": "ranks",
    "targets": "target_sets",
    "method": "methods",
    "steps": "budget steps:N",
    "epochs": "budget steps:N",
    "tokens_per_batch": "tokens_per_step",
}
NOTES = {
    "lr.lora": "every method has its rate, as in --lr.lora 5e-4 --lr.full 2e-5",
    "targets": "names are separated by commas, as in --targets q_proj,v_proj",
    "warmup": "it counts steps or, below 1, is a share of all steps",
    "layers": "blocks are spelt as slices, as in --layers 0:12, or -16: for the last 16",
    "tokens_per_batch": "it counts the tokens of one pass, not rows: rows times their mean length; "
    "--tokens-per-step counts those of an optimizer step",
    "tokens_per_step": "it counts the tokens of an optimizer step, whatever the passes",
}
OURS = {name: flag for flag, names in OTHERS.items() for name in names.split()}
# What is said to be done that is done anyway.
NEEDLESS = {
    "train": "the command always trains",
    "do_train": "the command always trains",
    "use_peft": "the method is LoRA where none is named",
    "use_lora": "the method is LoRA where none is named",
}
LISTS = ("--targets", "--methods", "--ranks", "--target-sets")


def our_name(name: str, flags: Collection[str]) -> str | None:
    """Return "--learning-rate is called --lr here", None unless `flags` has what it is called.

    name: a flag of the command line, or a key of a recipe.
    """
    spelt = name.partition("=")[0]
    key = spelt.lstrip("-").replace("-", "_").lower()
    flag = OURS.get(key, "")
    here = {flag_name.strip("-").replace("_", "-") for flag_name in flags}
    if key in NEEDLESS and "data" in here:
        return f"{spelt} is not needed, for {NEEDLESS[key]}; leave it out"
    if "--budget" in flags:
        flag = OF_COMPARE.get(flag or key, flag)
    ours, _, value = flag.partition(" ")
    if ours.partition(".")[0].replace("_", "-") not in here:
        return None
    if spelt.startswith("-"):
        ours_there = " ".join(["--" + ours.replace("_", "-"), *([value] if value else [])])
    else:
        ours_there = f"{ours}: {value}" if value else ours
    note = f"; {NOTES[ours]}" if ours in NOTES else ""
    return f"{spelt} is called {ours_there} here{note}"


def with_commas(arguments: Sequence[str], unused: Collection[str]) -> str | None:
    """Return how to write several values of one flag, None unless that left `unused` over."""
    for flag in LISTS:
        if flag not in arguments:
            continue
        after = arguments[arguments.index(flag) + 1 :]
        values = list(takewhile(lambda argument: not argument.startswith("-"), after))
        if len(values) > 1 and values[-1] in unused:
            # Where MODEL follows them, nobody knows where the values end.
            whole = f": {flag} {','.join(values)}" if set(values[1:]) <= set(unused) else ""
            return f"{flag} takes one value, in which names are separated by commas{whole}"
    return None
