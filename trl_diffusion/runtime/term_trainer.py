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

"""A trainer whose step is a sequence of loss terms, and the network that it trains, under whatever wraps it."""

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType, parse_flag_from_env
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule

from .reliable_trainer import ReliableTrainer
from .sharding import keep_float32_inputs


# A term of the loss, built when called: a scalar, and only then its graph.
LossTerm = Callable[[], torch.Tensor]


class TermTrainer(ReliableTrainer):
    """
    A [`ReliableTrainer`] that takes the gradient of one term of the loss before the next is built, and exchanges gradients
    between processes with the last. A subclass defines [`loss_terms`].
    """

    # `training_step` is our own and divides by the accumulation itself.
    loss_is_scaled_for_ga = True

    # ---- What a subclass defines ----

    @abstractmethod
    def loss_terms(self, model: nn.Module, inputs: Any) -> Sequence[LossTerm]:
        """
        The terms of the loss of one micro-batch; their sum is the loss.

        A term is called when its turn comes and its gradient is taken before the next is called, so memory holds the
        graph of one term. Every process must return the same number of terms with the same number of forwards.

        Args:
            model (`nn.Module`): the network as wrapped for training.
            inputs: what `_prepare_inputs` returned.
        """

    @abstractmethod
    def _describe(self, inputs: Any) -> str:
        """The rows of a micro-batch, for messages."""

    def _update_context(self) -> contextlib.AbstractContextManager[None]:
        """What the terms of a micro-batch are computed in."""
        return contextlib.nullcontext()

    # ---- Training step ----

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        self._stop_if_terminated()
        model.train()
        inputs = self._prepare_inputs(inputs)
        self._step_losses.append(([], self._describe(inputs)))
        kwargs = {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}
        with self._update_context():
            terms = self.loss_terms(model, inputs)
            state = self.accelerator.gradient_state
            synchronize = state.sync_gradients
            total = torch.zeros((), device=self.args.device)
            for index, term in enumerate(terms):
                # Gradients are exchanged once, with the last term; DDP decides on that in the forward already.
                exchange = synchronize and index == len(terms) - 1
                with contextlib.nullcontext() if exchange else self._no_exchange(model):
                    state._set_sync_gradients(exchange)
                    loss = term()
                    self._note_loss(loss)
                    if exchange:
                        loss = self._spoil_bad_step(loss)
                    self.accelerator.backward(loss / self.current_gradient_accumulation_steps, **kwargs)
                total += loss.detach()
            state._set_sync_gradients(synchronize)
        return total / self.current_gradient_accumulation_steps

    def _no_exchange(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Within this context a backward pass keeps its gradients to this process, where that saves more than it costs."""
        if isinstance(model, FSDPModule):
            # FSDP2 holds gradients that are not exchanged whole, in float32, and the Trainer lets it do so in all
            # micro-batches but the last.
            model.set_requires_gradient_sync(True)
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)

    # ---- The network ----

    @property
    def network(self) -> nn.Module:
        """The network that is trained, without what the training wraps around it: DDP, DeepSpeed, `torch.compile`."""
        return self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, and not all weights."""
        return isinstance(self.network, PeftModel)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        wants_fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP") or self.args.fsdp_plugin_args is not None
        if wants_fsdp and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            raise ValueError(
                "FSDP2 is asked for on processes without accelerators, where accelerate does not shard. Use zero2 or "
                "zero3 to shard on CPUs, or multi_gpu, which copies the weights to each process."
            )
        if self.is_fsdp_enabled:
            keep_float32_inputs(self.accelerator.state.fsdp_plugin)

    def _converted_dtype(self) -> torch.dtype | None:
        """
        The dtype that DeepSpeed has converted the weights to, or that FSDP2 converts them to in a forward; `None` where
        neither does, and autocast decides.
        """
        if self.deepspeed is not None:
            return next(self.deepspeed.module.parameters()).dtype
        policy = self.accelerator.state.fsdp_plugin.mixed_precision_policy if self.is_fsdp_enabled else None
        return policy.param_dtype if policy is not None and isinstance(self.model, FSDPModule) else None

    def _trained_weights_gathered(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the trained weights are whole, where ZeRO-3 partitions them."""
        if self.deepspeed is None or not self.deepspeed.zero_optimization_partition_weights():
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([p for p in self.model.parameters() if p.requires_grad])

    @contextlib.contextmanager
    def rollout_model(self, merged: bool = False) -> Iterator[nn.Module]:
        """
        The network to sample with, in eval mode (no dropout); the former mode returns afterwards. If `merged`, as
        [`merged_adapter`] gives it.
        """
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        context = contextlib.nullcontext(model)
        if model is self.model and not isinstance(model, FSDPModule):
            # Until the training starts, the Trainer leaves the network of a sharded run on the CPU.
            if not self.is_in_train and any(p.device != self.args.device for p in model.parameters()):
                model.to(self.args.device)
        elif self.deepspeed is not None and self.deepspeed.zero_optimization_partition_weights():
            if self.args.ds3_gather_for_rollout:
                from .deepspeed_internals import gathered

                context = gathered(self.deepspeed)
        try:
            with context as whole, merged_adapter(self.network) if merged else contextlib.nullcontext():
                yield whole
        finally:
            model.train(was_training)


@contextlib.contextmanager
def merged_adapter(network: nn.Module) -> Iterator[None]:
    """
    Within this context the weights of the layers that have an adapter include it, unless it is switched off. Afterwards
    they are what they were, bit for bit; taking the adapter off again would leave rounding.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters]
    kept = {}
    try:
        with torch.no_grad():
            for layer in layers:
                for parameter in layer.get_base_layer().parameters(recurse=False):
                    kept[parameter] = parameter.data
                    parameter.data = parameter.data.clone()
                layer.merge()
        yield
    finally:
        for layer in layers:
            layer.merged_adapters.clear()
        for parameter, data in kept.items():
            parameter.data = data
