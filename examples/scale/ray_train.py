"""Train with Ray Train: each worker of its TorchTrainer is a process of one `veneer.tune`.

    pip install 'ray[train]'
    python examples/scale/ray_train.py MODEL DATA OUT --workers 16 --gpu

Ray starts the workers on whatever machines its cluster has, and sets up torch.distributed among
them; Veneer finds it there. OUT and DATA are on a file system that all machines share. Where a
worker dies, Ray starts all of them again, and the run goes on from its newest checkpoint.
"""

import argparse
from pathlib import Path

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def work(settings: dict) -> None:
    """Do the part of one worker, and report each step to Ray."""
    import veneer
    from veneer.training.events import Step

    out = Path(settings["out"])
    recipe = veneer.Recipe(
        model=settings["model"],
        data=Path(settings["data"]),
        lora=veneer.LoRA(rank=settings["rank"], targets="all"),
        training=veneer.TrainConfig(steps=settings["steps"], save_every=settings["save_every"]),
        out=out,
    )
    has_checkpoint = any(out.glob("checkpoints/*"))
    for event in veneer.tune(recipe, resume=has_checkpoint):
        if isinstance(event, Step):
            ray.train.report({"step": event.step, "loss": event.loss})


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an adapter with Ray Train.")
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="one GPU for each worker")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--save-every", type=int, default=100)
    settings = vars(parser.parse_args())
    # Workers have directories of their own.
    settings |= {name: str(Path(settings[name]).resolve()) for name in ("data", "out")}
    if Path(settings["model"]).exists():
        settings["model"] = str(Path(settings["model"]).resolve())
    trainer = TorchTrainer(
        work,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=settings["workers"], use_gpu=settings["gpu"]),
        run_config=RunConfig(
            name="veneer",
            storage_path=f"{settings['out']}/ray",
            failure_config=FailureConfig(max_failures=3),
        ),
    )
    trainer.fit()
    print(f"trained: {settings['out']}")


if __name__ == "__main__":
    main()
