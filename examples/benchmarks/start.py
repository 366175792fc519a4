"""
Time and disk until the first optimizer step, with a short and a long dataset, on the built-in world.

```bash
python examples/benchmarks/start.py
torchrun --standalone --nproc_per_node 2 examples/benchmarks/start.py
```
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path


# Read when huggingface_hub is imported. One folder for the processes of a launch, which have one parent.
ASSETS = Path(tempfile.gettempdir()) / f"start-benchmark-{os.getppid()}"
os.environ["HF_ASSETS_CACHE"] = str(ASSETS)

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, shapes  # noqa: E402


class FirstStep(TrainerCallback):
    """Notes when the first optimizer step ends, and ends the run."""

    def on_step_end(self, args, state, control, **kwargs):
        self.time = time.perf_counter()
        control.should_training_stop = True


def disk_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run(num_prompts: int) -> tuple[float, int]:
    """Seconds from the dataset to the end of the first step, and bytes of embeddings on disk."""
    state = PartialState()
    if state.is_main_process:
        shutil.rmtree(ASSETS, ignore_errors=True)
    state.wait_for_everyone()
    # Distinct prompts, as many as are asked for.
    captions = shapes.load_dataset("train")["prompt"]
    dataset = Dataset.from_list([{"prompt": f"{i} {captions[i % len(captions)]}"} for i in range(num_prompts)])
    first_step = FirstStep()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        args = ChunkGRPOConfig(
            output_dir=folder, num_inference_steps=6, chunk_sizes=[2, 3], num_generations=8,
            per_device_train_batch_size=48 // PartialState().num_processes, max_steps=2, save_strategy="no",
            log_samples=False, disable_tqdm=True, cache_prompt_embeds=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = ChunkGRPOTrainer("shapes", lambda images, prompts: [float(i) for i, _ in enumerate(images)], args, dataset,
                                   callbacks=[first_step])  # fmt: skip
        trainer.train()
    state.wait_for_everyone()
    return first_step.time - start, disk_of(ASSETS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[100, 20_000], help="lengths of the datasets")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is measured, in turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[int, list[tuple[float, int]]] = {count: [] for count in options.prompts}
    for turn in range(options.rounds + 1):  # the first loads libraries
        for count in options.prompts:
            result = run(count)
            if turn > 0:
                results[count].append(result)
    if PartialState().is_main_process:
        shutil.rmtree(ASSETS)
        print("| prompts | seconds to the first step: median (least to most) | KiB of embeddings on disk |")
        print("|---|---|---|")
        for count, measured in results.items():
            seconds = [value for value, _ in measured]
            kib = statistics.median(size for _, size in measured) / 1024
            print(
                f"| {count} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {kib:.0f} |"
            )


if __name__ == "__main__":
    main()
