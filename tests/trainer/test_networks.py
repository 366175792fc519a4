# Copyright 2026 The trl_diffusion authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Networks as users pass them, the optimizers they pass along, and runs that would train nothing."""

import logging
import re

import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_flux_pipeline
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from trl_diffusion.hub import save_adapter
from trl_diffusion.runtime.updates import SILENT_STEPS, FirstUpdate

from .conftest import trainable


def plain_draw(pipeline, trainer):
    """What diffusers' own pipeline draws where the trainer draws `trainer.generate(["a cat"], [7])`."""
    noise = trainer.flow.draw_noise(1, 32, 32, torch.Generator().manual_seed(7))
    return pipeline(
        "a cat", height=32, width=32, num_inference_steps=6, guidance_scale=3.5,
        latents=pipeline._pack_latents(noise, *noise.shape), output_type="pt",
        max_sequence_length=trainer.flow.max_sequence_length,
    ).images  # fmt: skip


@pytest.fixture
def style(tmp_path):
    """A LoRA that a user has from elsewhere."""
    pipeline = tiny_flux_pipeline(seed=0)
    model = get_peft_model(pipeline.transformer, LoraConfig(r=4, target_modules=["to_q", "to_k"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape)
    save_adapter(model, type(pipeline), tmp_path / "style")
    return tmp_path / "style"


def load(pipeline, folder, **kwargs):
    pipeline.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors", **kwargs)


class TestAdapterInPassedPipeline:
    @pytest.mark.parametrize("peft_config", [None, False], ids=["lora", "full"])
    def test_refused_and_after_the_lines_trained_on_top_of(self, make_trainer, tmp_path, style, peft_config):
        pipeline = tiny_flux_pipeline(seed=0)
        load(pipeline, style, adapter_name="default")
        with pytest.raises(ValueError, match=r"holds adapters already, \['default'\] in its transformer"):
            make_trainer(model=pipeline, peft_config=peft_config)
        pipeline.fuse_lora(components=["transformer"])
        pipeline.unload_lora_weights()
        trainer = make_trainer(model=pipeline, peft_config=peft_config, sigma_shift=None, learning_rate=5e-3)
        started = trainer.generate(["a cat"], [7])
        trainer.train()
        trained = trainer.generate(["a cat"], [7])
        assert (trained - started).abs().max() > 1e-3
        trainer.save_model()
        trainer.create_model_card()

        fresh = tiny_flux_pipeline(seed=0)
        if peft_config is None:
            load(fresh, style, adapter_name="default")
            torch.testing.assert_close(plain_draw(fresh, trainer), started, rtol=0, atol=1e-5)
            fresh.fuse_lora()
            fresh.unload_lora_weights()
            load(fresh, tmp_path / "out")
        else:
            fresh.transformer = FluxTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
        torch.testing.assert_close(plain_draw(fresh, trainer), trained, rtol=0, atol=1e-5)
        card = (tmp_path / "out" / "README.md").read_text()
        assert "with default fused into its weights" in card
        snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
        steps = [
            'pipe.load_lora_weights("path/to/default", adapter_name="default")',
            "pipe.fuse_lora()",
            "pipe.unload_lora_weights()",
            'pipe.load_lora_weights("path/to/this/folder", weight_name="pytorch_lora_weights.safetensors")',
        ]
        assert ("\n".join(steps) in snippet) == (peft_config is None)

    def test_a_pipeline_that_was_trained_already(self, make_trainer):
        pipeline = tiny_flux_pipeline(seed=0)
        make_trainer(model=pipeline)
        with pytest.raises(ValueError, match="holds adapters already"):
            make_trainer(model=pipeline)


class TestCompiled:
    @pytest.mark.parametrize("peft_config", [None, False], ids=["lora", "full"])
    def test_compiled_before_trains_and_exports_as_a_plain_one(self, make_trainer, tmp_path, peft_config):
        plain = make_trainer(peft_config=peft_config, output_dir=str(tmp_path / "plain"))
        plain.train()
        pipeline = tiny_flux_pipeline(seed=0)
        pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
        trainer = make_trainer(model=pipeline, peft_config=peft_config)
        trainer.train()
        for name, weight in trainable(plain).items():
            assert torch.equal(trainable(trainer)[name], weight), name
        for run in (plain, trainer):
            run.save_model()
        file = "pytorch_lora_weights.safetensors" if peft_config is None else (
            "transformer/diffusion_pytorch_model.safetensors"
        )  # fmt: skip
        assert load_file(tmp_path / "out" / file).keys() == load_file(tmp_path / "plain" / file).keys()

    @pytest.mark.parametrize("peft_config", [None, False], ids=["lora", "full"])
    def test_torch_compile_changes_nothing_but_the_speed(self, make_trainer, train_dataset, tmp_path, peft_config):
        """Evaluation against the base, card, saving, the best model, KL to the base and resuming know what is inside."""
        settings = {
            "peft_config": peft_config, "eval_dataset": train_dataset, "num_eval_images": 2, "beta": 0.1,
            "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
            "load_best_model_at_end": True, "metric_for_best_model": "reward", "greater_is_better": True,
            "learning_rate": 1e-3,
        }  # fmt: skip
        plain = make_trainer(output_dir=str(tmp_path / "plain"), **settings)
        trainer = make_trainer(torch_compile=True, torch_compile_backend="eager", **settings)
        image = None
        for run in (plain, trainer):
            # The wrapper is there, and what is inside runs as it is: compiling it takes the better part of a minute.
            with torch.compiler.set_stance("force_eager"):
                run.train()
                run.create_model_card()
                expected, image = image, run.generate(["a cat"], [7])
        assert type(trainer.model_wrapped) is not type(trainer.network) is type(plain.network)
        evaluations = [[log for log in run.state.log_history if "eval_reward" in log] for run in (plain, trainer)]
        for wanted, found in zip(*evaluations, strict=True):
            assert found.keys() == wanted.keys()
            assert ("eval_base/reward" in found) == (peft_config is None)
            assert found["eval_reward"] == pytest.approx(wanted["eval_reward"], abs=1e-6)
        for name, weight in trainable(plain).items():
            torch.testing.assert_close(trainable(trainer)[name], weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
        cards = [(tmp_path / folder / "README.md").read_text() for folder in ("plain", "out")]
        assert cards[0].count("lora\\_r") == cards[1].count("lora\\_r") == (peft_config is None)
        files = [sorted(path.name for path in (tmp_path / f / "checkpoint-1").rglob("*")) for f in ("plain", "out")]
        assert files[0] == files[1]
        resumed = make_trainer(torch_compile=True, torch_compile_backend="eager", **settings)
        with torch.compiler.set_stance("force_eager"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
        assert resumed.state.best_metric == pytest.approx(trainer.state.best_metric, abs=1e-6)


class TestOptimizers:
    @pytest.mark.parametrize(
        ("make", "peft_config", "message"),
        [
            (
                lambda p: (AdamW(p.transformer.parameters()), None),
                None,
                r"AdamW, which cannot hold .*\(AdamW, \{\.\.\.\}\)",
            ),
            (
                lambda p: (AdamW(p.vae.parameters()), None),
                False,
                r"lacks \d+ of the \d+ weights that are trained, as 'pos",
            ),
            (lambda p: (AdamW(list(p.transformer.parameters())[1:]), None), False, r"lacks 1 of the \d+ weights"),
            (
                lambda p: (None, LambdaLR(AdamW(p.transformer.parameters()), lambda step: 1.0)),
                None,
                "LambdaLR of another optimizer.*lr_scheduler_type",
            ),
        ],
        ids=["lora", "none", "not-all", "scheduler"],
    )
    def test_that_hold_other_weights_are_refused(self, make_trainer, make, peft_config, message):
        pipeline = tiny_flux_pipeline(seed=0)
        message = message.replace("'pos", "'")
        with pytest.raises(ValueError, match=message):
            make_trainer(model=pipeline, optimizers=make(pipeline), peft_config=peft_config)
        assert pipeline.text_encoder is not None or peft_config is False  # before anything started

    def test_of_a_model_that_the_trainer_loads(self, make_trainer):
        with pytest.raises(ValueError, match="cannot hold the weights that are trained"):
            make_trainer(
                model="never/loaded", peft_config=False, optimizers=(SGD(torch.nn.Linear(1, 1).parameters()), None)
            )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"optimizers": (SGD(torch.nn.Linear(1, 1).parameters()), None)}, "both give an optimizer"),
            ({"optimizer_cls_and_kwargs": (SGD, {"params": []})}, r"gives \['params'\].*Leave that out"),
        ],
    )
    def test_given_twice(self, make_trainer, arguments, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(**{"optimizer_cls_and_kwargs": (SGD, {"lr": 0.1}), **arguments})

    def test_class_and_arguments(self, make_trainer):
        """A step of plain gradient descent moves the weights by learning rate times gradient."""
        gradients = {}

        class Watched(SGD):
            def step(self, *args, **kwargs):
                gradients.update({id(p): p.grad.clone() for group in self.param_groups for p in group["params"]})
                return super().step(*args, **kwargs)

        trainer = make_trainer(
            optimizer_cls_and_kwargs=(Watched, {"lr": 0.5}), max_steps=1, lr_scheduler_type="constant"
        )
        before = trainable(trainer)
        trainer.train()
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                wanted = before[name] - 0.5 * gradients[id(parameter)]
                torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-6, atol=1e-8)

    def test_of_a_passed_pipeline(self, make_trainer):
        pipeline = tiny_flux_pipeline(seed=0)
        optimizer = AdamW(pipeline.transformer.parameters(), lr=1e-4)
        trainer = make_trainer(model=pipeline, peft_config=False, optimizers=(optimizer, None), max_steps=1)
        before = trainable(trainer)
        trainer.train()
        assert all((before[name] != weight).any() for name, weight in trainable(trainer).items() if weight.ndim > 1)


class SilentSGD(SGD):
    """Changes nothing in its first steps, as rectified optimizers do."""

    def __init__(self, params, silent):
        super().__init__(params, lr=1.0)
        self.silent = silent

    def step(self, closure=None):
        self.silent -= 1
        if self.silent < 0:
            super().step(closure)


class TestFirstUpdate:
    def test_an_optimizer_of_other_weights(self, make_trainer):
        trainer = make_trainer()
        trainer.create_optimizer()
        trainer.optimizer.param_groups = [
            {**trainer.optimizer.param_groups[0], "params": [torch.nn.Parameter(torch.ones(1))]}
        ]
        with pytest.raises(RuntimeError, match="learning rate 0.01 changed none of the trained weights.*param_groups"):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_a_learning_rate_below_the_precision(self, make_trainer):
        trainer = make_trainer(peft_config=False, learning_rate=1e-30, weight_decay=0.0)
        with pytest.raises(RuntimeError, match="1e-30 changed none .*too small for the precision"):
            trainer.train()

    def test_an_optimizer_that_is_silent_in_its_first_steps_is_waited_for(self):
        def step_until(silent, steps):
            network = torch.nn.Linear(2, 1)
            optimizer = SilentSGD(network.parameters(), silent)
            update = FirstUpdate(network, optimizer, None)
            for _ in range(steps):
                network(torch.ones(3, 2)).sum().backward()
                optimizer.step()
                update.check(skipped=False, accelerator=Accelerator(cpu=True))
            return update.seen

        assert not step_until(SILENT_STEPS, SILENT_STEPS)
        assert step_until(SILENT_STEPS, SILENT_STEPS + 1)
        with pytest.raises(RuntimeError, match=f"{SILENT_STEPS + 1} optimizer steps with .* rate 1 changed none"):
            step_until(100, 100)

    def test_a_run_that_ends_while_its_optimizer_is_silent_says_so(self, make_trainer, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        trainer = make_trainer(optimizer_cls_and_kwargs=(SilentSGD, {"silent": 9}), max_steps=2)
        trainer.train()
        assert "after 2 optimizer steps that changed none of the trained weights" in caplog.text
        assert "SilentSGD may be silent in its first steps" in caplog.text

    def test_no_gradient_at_all(self, make_trainer):
        trainer = make_trainer()
        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.zero_grad())
        with pytest.raises(RuntimeError, match="found no gradient on any of the trained weights"):
            trainer.train()

    def test_a_warm_up_and_steps_without_a_gradient_are_waited_for(self, make_trainer):
        """The first step has the learning rate 0, the second equal rewards, hence the gradient 0; the third trains."""
        calls = []

        def reward(images, prompts, **columns):
            calls.append(len(prompts))
            return [0.5] * len(prompts) if len(calls) <= 2 else [float(i) for i in range(len(prompts))]

        seen = []

        class Callback(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                seen.append(trainer._first_update.seen)

        trainer = make_trainer(
            reward_funcs=reward, warmup_steps=2, max_steps=4, weight_decay=0.0, callbacks=[Callback()],
            gradient_accumulation_steps=1, steps_per_generation=1,
        )  # fmt: skip
        before = trainable(trainer)
        trainer.train()
        assert seen[0] is False and seen[-1] is True
        assert any((before[name] != weight).any() for name, weight in trainable(trainer).items())

    def test_an_adapter_that_is_frozen(self, make_trainer):
        with pytest.raises(ValueError, match="inference_mode=True: the adapter would not be trained"):
            make_trainer(peft_config=LoraConfig(inference_mode=True))
