"""One owner of a run: it attaches methods to a model, drives them through the steps of training, and bakes them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from hf_approx.checkpoint import attach_packing
from hf_approx.finite import Named, refuse_not_finite
from hf_approx.logs import get_logger
from hf_approx.methods.base import Method, MethodConfig, Part, method_configs
from hf_approx.methods.batch import Batch, batches_of
from hf_approx.methods.bound import BoundOptimizer
from hf_approx.methods.latent import Latent
from hf_approx.methods.mixing import MixedBatch, Mixing, mixed_batches
from hf_approx.methods.sharing import DDP_IGNORES
from hf_approx.modules.bank import share_of
from hf_approx.modules.sharded import add_totals, is_sharded, reshard, take_from_first, write

logger = get_logger(__name__)


class MethodStack:
    """Methods at work on one model, in the order in which they were attached.

    The model holds effective weights, as ordinary parameters; what is trained in their place is here. A step is

        loss.backward()
        stack.before_step()   # gradients of the effective weights become those of what is trained
        optimizer.step()      # over `parameters()` and `param_groups()`
        stack.after_step(progress)

    which an optimizer of `bind` does by itself.

    Args:
        model: To compress.
        configs: One config, or several.

    Raises:
        ValueError: A config does not fit the model, or they do not go together. The model is then unchanged.

    Attributes:
        share: Once baked, which share of the weights that the model had was compressed.
    """

    def __init__(self, model: nn.Module, configs: MethodConfig | Iterable[MethodConfig]) -> None:
        self.model = model
        self.methods: list[Method] = [config.build() for config in method_configs(configs, "attach")]
        attached: list[Method] = []
        try:
            for method in self.methods:
                method.attach(model, attached)
                attached.append(method)
        except BaseException:
            for method in reversed(attached):
                method.detach()
            raise
        self.share: float | None = None
        self._pulled = False
        self._batches: list[Batch | MixedBatch | Mixing] = []
        self.write()

    @property
    def latents(self) -> list[Latent]:
        """What is trained in the place of the model's weights; those that are mixed from others come last."""
        found = {id(latent): latent for method in self.methods for latent in method.latents}
        return sorted(found.values(), key=lambda latent: latent.mixes)

    def follow(self) -> None:
        """Go where the model went: to another device, or apart over processes that `fully_shard` it.

        Raises:
            ValueError: Two targets have become one parameter.
        """
        reshard(self.model)
        found: dict[int, str] = {}
        for latent in self.latents:
            name = found.setdefault(id(latent.effective), latent.target.name)
            if name != latent.target.name:
                raise ValueError(
                    f"'{name}' and '{latent.target.name}' were tied after methods were attached; tie them before, and "
                    "add them to exclude."
                )
            if latent.is_sharded:
                latent.follow()
        # The others go together with what is stacked of them.
        self.batches()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the task's optimizer trains, by the names the model has for it: latents, and all that is left alone."""
        self.follow()
        with self.exposed():
            own = {id(param) for group in self.param_groups() for param in group["params"]}
            found = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in own]
        return iter(found)

    def parameters(self) -> list[nn.Parameter]:
        """The same, for an optimizer."""
        return [param for _, param in self.named_parameters()]

    def param_groups(self) -> list[dict[str, Any]]:
        """What the methods train of their own (scores, limits, scales, coefficients), with learning rates for Adam."""
        self.follow()
        return [group for method in self.methods for group in method.param_groups()]

    @contextmanager
    def exposed(self) -> Iterator[None]:
        """Within, the model has what is trained under the names of its weights: for whoever makes an optimizer."""
        latents = {id(latent.effective): latent for latent in self.latents}
        swapped = []
        for module in self.model.modules():
            for name, param in module._parameters.items():
                if param is not None and id(param) in latents:
                    swapped.append((module, name, param))
        for module, name, param in swapped:
            module._parameters[name] = latents[id(param)].weight
        try:
            yield
        finally:
            for module, name, param in swapped:
                module._parameters[name] = param

    def bind(self, optimizer: Optimizer, steps: int | None = None) -> BoundOptimizer:
        """The optimizer of a loop that calls `step` and `zero_grad` and nothing of the stack.

        Args:
            optimizer: Of `parameters()`. What the methods train of their own gets Adam beside it.
            steps: How many optimizer steps there will be, which schedules go by. None: they move with `advance`.
        """
        return BoundOptimizer(self, optimizer, steps)

    def advance(self, progress: float) -> None:
        """Move every schedule and make the effective weights anew.

        Args:
            progress: From 0 at the first step of training to 1 at its last.
        """
        for method in self.methods:
            method.on_step(progress)
        self.write(confine=True)

    def write(self, confine: bool = False) -> None:
        """Make the effective weights anew from what is trained.

        Args:
            confine: Keep what is trained in the range that methods make use of, as after every step.
        """
        reshard(self.model)
        for batch in self.batches():
            batch.write(confine=confine)

    def batches(self) -> list[Batch | MixedBatch | Latent]:
        """What is computed together; weights that are mixed from others come last."""
        latents = self.latents
        together = [latent for latent in latents if not latent.is_sharded]
        known = {id(latent) for batch in self._batches for latent in batch.latents}
        if known != {id(latent) for latent in together} or any(latent.moved for latent in together):
            for latent in together:
                latent.follow()
            mixed = [latent for latent in together if isinstance(latent, Mixing)]
            others = [latent for latent in together if not isinstance(latent, Mixing)]
            names = {id(stage): (m, name) for m in self.methods for name, stage in m.stages.items()}
            owners = [[names[id(stage)] for stage in latent.stages] for latent in others]
            groups = [tuple((id(method), method.group(name)) for method, name in each) for each in owners]
            batches = batches_of(others, groups)
            self._hand_parts(batches, names)
            self._batches = [*batches, *mixed_batches(mixed)]
        return [*self._batches, *(latent for latent in latents if latent.is_sharded)]

    def unstack(self) -> None:
        """Forget what is computed together: it is found anew when it is needed."""
        self._batches = []
        for method in self.methods:
            method.stacked = None

    def _hand_parts(self, batches: Sequence[Batch], owners: Mapping[int, tuple[Method, str]]) -> None:
        """Let every method have what is stacked of its own, and beside that what is split."""
        for method in self.methods:
            method.stacked = None
        for latent in self.latents if batches else ():
            if latent.is_sharded and not latent.mixes:
                for stage in latent.stages:
                    method, name = owners[id(stage)]
                    method.stacked = [*(method.stacked or ()), Part(stage, latent.weight, method.group(name))]
        for batch in batches:
            for stage, first in zip(batch.stages, batch.latents[0].stages, strict=True):
                method, name = owners[id(first)]
                method.stacked = [*(method.stacked or ()), Part(stage, batch.weight, method.group(name))]

    def advance_round(self, round_: int, rounds: int, progress: float) -> None:
        """As `advance`, in a round of a ticket search.

        Args:
            round_: Which round, from 0.
            rounds: How many there are.
            progress: From 0 at the first step of the round to less than 1 at its last.
        """
        for method in self.methods:
            method.on_round_step(round_, rounds, progress)
        self.write(confine=True)

    def end_round(self, round_: int, rounds: int, legacy: bool = False) -> bool:
        """Make ready for the next round of a ticket search or, after the last, for `settle`.

        Args:
            round_: The round that ended, from 0.
            rounds: How many there are.
            legacy: Follow the published script where it departs from the paper.

        Returns:
            Whether the next round starts from the early weights again.
        """
        rewinds = [method.end_round(round_, rounds, legacy) for method in self.methods]
        self.write()
        return any(rewinds)

    @torch.no_grad()
    def begin(self) -> None:
        """Make ready for training where the model is now: all processes go on from what the first one has.

        `DistributedDataParallel` gives every process the model of the first one, but it knows nothing of what is
        trained in the place of weights: call this once it has wrapped the model, on all processes.
        """
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        # What accelerate takes for a single process trains on its own.
        if several and PartialState().num_processes > 1:
            self.follow()
            ignored = getattr(self.model, DDP_IGNORES, ())
            left_alone = [param for name, param in self.model.named_parameters() if name in ignored]
            for tensor in [*self.tensors().values(), *left_alone]:
                take_from_first(tensor)
        self.write()

    def before_step(self, scale: float = 1.0) -> None:
        """Turn the gradients that the model has into those of what is trained, penalties included.

        Args:
            scale: What the loss was multiplied by, if a GradScaler did.
        """
        reshard(self.model)
        # What is mixed comes first: its gradients are those of templates, which may have stages.
        add_totals([part for batch in reversed(self.batches()) for part in batch.pull()])
        for method in self.methods:
            penalty = method.penalty()
            if penalty is not None:
                (penalty * scale).backward()
        for method in self.methods:
            method.on_gradients(scale)
        for batch in self._batches:
            batch.hand_out()
        self._pulled = True

    def after_step(self, progress: float | None = None) -> None:
        """Bring the model up to date with what the optimizer made.

        Args:
            progress: Of the step that comes; None leaves schedules where they are.
        """
        self.zero_grad()
        if progress is None:
            self.write()
        else:
            self.advance(progress)

    def zero_grad(self) -> None:
        """Forget all gradients of effective weights and of what is trained in their place."""
        for each in [*self.latents, *self._batches]:
            each.zero_grad()
        self._pulled = False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within, the model computes without the noise of training."""
        training = [stage for latent in self.latents for stage in latent.stages if stage.training]
        for stage in training:
            stage.eval()
        self.write()
        try:
            yield
        finally:
            for stage in training:
                stage.train()
            self.write()

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Within, the model computes with the trained weights themselves, as if no method was there."""
        inserted = [module for method in self.methods for module in method.inserted]
        for module in inserted:
            module.bypassed = True
        reshard(self.model)
        for batch in self.batches():
            batch.write(bare=True)
        try:
            yield
        finally:
            for module in inserted:
                module.bypassed = False
            self.write()

    @property
    def is_final(self) -> bool:
        """Whether the compressed structure of every method is settled."""
        return all(method.is_final for method in self.methods)

    def settle(self) -> None:
        """Fix the compressed structure of every method now, whatever the schedules say."""
        for method in self.methods:
            if not method.is_final:
                method.settle()
        self.write()

    def metrics(self) -> dict[str, float]:
        """Numbers of every method for a log, as `method/number`."""
        return {f"{label}/{k}": v for label, method in self.labelled().items() for k, v in method.metrics().items()}

    def labelled(self) -> dict[str, Method]:
        """The methods by name, numbered where two share it."""
        names = [method.name for method in self.methods]
        labels = [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names)]
        return dict(zip(labels, self.methods, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """What is trained and kept that is not in the model's state dict, by name; sharing memory."""
        return {name: tensor for latent in self.latents for name, tensor in latent.tensors()}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned and make the effective weights anew.

        Raises:
            ValueError: One is missing, unknown or of another shape. Nothing is changed.
        """
        self._refuse_other(tensors)
        for name, tensor in self.tensors().items():
            write(tensor, tensors[name])
        self.write()

    def _refuse_other(self, tensors: Mapping[str, Tensor]) -> None:
        own = self.tensors()
        odd = sorted(own.keys() ^ tensors.keys()) or [n for n in own if own[n].shape != tensors[n].shape]
        if odd:
            raise ValueError(
                f"The state does not fit these methods: '{odd[0]}' is "
                + ("missing." if odd[0] not in tensors else "unknown." if odd[0] not in own else "of another shape.")
            )

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from: JSON types under `methods`, and `tensors`."""
        tensors = {name: tensor.detach() for name, tensor in self.tensors().items()}
        return {"methods": [method.state_dict() for method in self.methods], "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, of the same methods on the same model.

        Raises:
            ValueError: It is of others. Nothing is changed.
        """
        if len(state["methods"]) != len(self.methods):
            raise ValueError(f"The state is of {len(state['methods'])} methods, and {len(self.methods)} are at work.")
        self._refuse_other(state["tensors"])
        for method, saved in zip(self.methods, state["methods"], strict=True):
            method.load_state_dict(saved)
        self.load_tensors(state["tensors"])

    def detach(self) -> None:
        """Take all methods off again; every weight is what the optimizer trained.

        Raises:
            ValueError: The model is sharded.
        """
        self._refuse_sharded("detach")
        for method in reversed(self.methods):
            method.detach()

    def refuse_diverged(self, where: str = "MethodStack") -> None:
        """Raise `NotFiniteError` if a weight, or a number that a method trains, is NaN or infinite."""
        refuse_not_finite(where, self.model)
        refuse_not_finite(where, self.learned())

    def learned(self) -> Iterator[Named]:
        """All that is trained in the place of weights, by name, and whether it may be infinite."""
        for latent in self.latents:
            yield from latent.finite_parts()

    def bake(self, others: Sequence[str] = ()) -> list[str]:
        """Leave an ordinary model with compressed weights.

        Args:
            others: Names of parameters that were compressed before.

        Returns:
            The names that the others and those compressed have now; some may be gone.

        Raises:
            ValueError: The model is sharded.
        """
        self._refuse_sharded("bake")
        if not self.is_final:
            # The last method bakes its whole stack, so those before it are settled before.
            self.methods[-1].refuse_diverged()
            self.settle()
        names = [*others, *(name for method in reversed(self.methods) for name in method.bake())]
        for method in sorted(self.methods, key=lambda method: method.renames):
            names = method.remove(names)
        names = list(dict.fromkeys(names))
        self.share = share_of(self.model, names, sum(method.removed for method in self.methods))
        return names

    def _refuse_sharded(self, what: str) -> None:
        if is_sharded(self.model):
            raise ValueError(
                f"{what}: fully_shard took the model's parameters over; before that make "
                "twin = hf_approx.methods.unsharding.Unsharded(stack), after training call twin.fill(stack) on all "
                f"processes and twin.stack.{what}() on the first."
            )

    def finalize(self, store_dtype: str | None = "float16") -> list[str]:
        """Fix what is not fixed yet, bake, and make `save_pretrained` write the model packed.

        Args:
            store_dtype: As of `attach_packing`.

        Returns:
            Names of the compressed parameters.

        Raises:
            NotFiniteError: Training diverged. The model is unchanged.
            ValueError: The model is sharded.
        """
        self._refuse_sharded("finalize")
        if not all(method.is_final or method.after_training for method in self.methods):
            logger.warning(
                "finalize: the schedules did not come to their end, so what is removed or rounded is decided now and "
                "not trained on; say how long training is: stack.bind(optimizer, steps=...)."
            )
        names = self.bake()
        if isinstance(self.model, PreTrainedModel):
            attach_packing(self.model, names, store_dtype, self.grids)
        return names

    @property
    def grids(self) -> dict[str, Any]:
        """The grids of quantized weights, once baked."""
        return {name: grid for method in self.methods for name, grid in method.grids.items()}


def attach(model: nn.Module, configs: MethodConfig | Sequence[MethodConfig]) -> MethodStack:
    """Put methods to work on a model, for a training loop of one's own.

        stack = hf_approx.attach(model, [SparsificationConfig(target_sparsity=0.9)])
        optimizer = stack.bind(torch.optim.AdamW(stack.parameters(), lr=1e-4), steps=1000)
        ...  # the loop as it was
        stack.finalize()  # save_pretrained now packs

    Args:
        model: To compress; it stays an ordinary model, whose weights are masked, noisy or rounded already.
        configs: One config, or several in the order in which they work.

    Raises:
        ValueError: A config does not fit the model, or they do not go together. The model is then unchanged.
    """
    return MethodStack(model, configs)
