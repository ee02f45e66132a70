"""One optimiser step over packed batches: its examples cut into batches that fit at once, and the two losses. Which
examples make a step is the trainer's business; how they are laid out on the machine is fit's. Needs torch: import it in
a job's process only."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from katherine import fit as fits
from katherine import packed_model, packing, ranks
from katherine.errors import TrainingError
from katherine.fit import Fit
from katherine.likelihood import token_logprobs
from katherine.packing import Batch, Size
from katherine.ranks import ALONE, Rank

# A sequence as the trainers know it: its ids, and which of them are learned.
Row = tuple[Sequence[int], Sequence[bool]]
# What a step consists of: a row, or the chosen and the rejected one of a pair.
Unit = Sequence[Row]


@dataclass(frozen=True, slots=True)
class Units:
    """A whole step's, as the collator gives them: of no type that accelerate would look into, token by token."""

    each: tuple[Unit, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """batches: this process's units of the step, cut. units: how many the step has. scored: its learned tokens in all;
    tokens: all of them."""

    batches: tuple[Batch, ...]
    units: int
    scored: int
    tokens: int


def collate(unit_of: Callable[[dict[str, Any]], Unit]) -> Callable[[list[dict[str, Any]]], dict[str, Units]]:
    """A collator for batches that are whole steps. `unit_of`: a dataset's example → its rows."""
    return lambda examples: {"units": Units(tuple(unit_of(example) for example in examples))}


def cut(units: Sequence[Unit], limit: int) -> list[list[Unit]]:
    """Units in groups of alike lengths with at most `limit` tokens each, as few as that allows and as even as that
    allows. A unit longer than the limit stands alone."""

    ordered = sorted(units, key=_tokens)
    total = sum(map(_tokens, ordered))
    aim = total / math.ceil(total / limit)
    groups: list[list[Unit]] = []
    held = 0
    for unit in ordered:
        size = _tokens(unit)
        # Half of a unit may stand over the even share, never over the limit.
        if not groups or held + size > limit or held + size / 2 > aim:
            groups.append([])
            held = 0
        groups[-1].append(unit)
        held += size
    return groups


def lay_out(units: Sequence[Unit], fit: Fit, device: Any, rank: Rank = ALONE, captured: Collection[Size] = ()) -> Step:
    """A step's units as batches on `device`: those of them that are this process's. captured: sizes that there are
    graphs of."""
    mine = ranks.share(units, _tokens, rank) if rank.of > 1 else units
    batches = tuple(
        packing.pack([row for unit in group for row in unit], fit.multiples, captured).to(device)
        for group in (cut(mine, fit.tokens) if mine else [])
    )
    # A row's first token is predicted from nothing.
    scored = sum(sum(learned[1:]) for unit in units for _, learned in unit)
    return Step(batches, len(units), scored, sum(map(_tokens, units)))


def _tokens(unit: Unit) -> int:
    return sum(len(ids) for ids, _ in unit)


# ------------------------------------------------------------------------------------------------ the trainers

# TRL's trainers, which these stand in front of, are imported when a run begins.
_Trainer: Any = object


class Packed(_Trainer):
    """Put before training.Recorded and a trainer class whose batches are whole steps. Set `fit` before train().

    Where memory runs out, the step is done again in a smaller layout, which holds from then on. A trainer made within
    ranks.together shares its steps: each process reads them whole and looks at its own part."""

    fit: Fit
    _replay: Any = None
    _told_to_stop = False

    def losses(self, model: Any, batch: Batch, whole: Step) -> torch.Tensor:
        """The batch's share of the step's loss."""
        raise NotImplementedError

    def done(self, mode: str, whole: Step) -> None:
        """After a step or an evaluated batch."""

    def logprobs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Of the batch's learned tokens, float32, (scored,)."""
        bare = self._bare(model)
        if self.fit.captured and torch.is_grad_enabled():
            hidden = self._replayed(model, bare)(batch)
        else:
            hidden = packed_model.hidden_states(bare, batch)
        return token_logprobs(hidden[batch.scored], bare.lm_head.weight, batch.labels, self.fit.logits)

    def _bare(self, model: Any) -> Any:
        return self.accelerator.unwrap_model(model).get_base_model()

    def _replayed(self, model: Any, bare: Any) -> Any:
        if self._replay is None:
            from katherine.replay import Replay

            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self._replay = Replay(lambda batch: packed_model.hidden_states(bare, batch), parameters)
        return self._replay

    @property
    def rank(self) -> Rank:
        return Rank(self.args.process_index, self.args.world_size)

    def _get_dataloader(self, *given: Any, **named: Any) -> Any:
        loader = super()._get_dataloader(*given, **named)
        if self.rank.of > 1:
            # accelerate would deal the batches out, one to each process, and repeat some where they do not go round.
            dealt = loader.batch_sampler
            dealt.num_processes, dealt.process_index, dealt.even_batches = 1, 0, False
        return loader

    def _wrap_model(self, model: Any, *given: Any, **named: Any) -> Any:
        # accelerate would put DistributedDataParallel around it, which adds up what autograd's hooks bring. What a
        # captured graph computes does not come that way: _sum adds up.
        model._is_accelerate_prepared = True
        return super()._wrap_model(model, *given, **named)

    def training_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        model.train()
        units: Units = inputs["units"]
        if self.rank.of > 1:
            # For the dropout. They follow from the step: a checkpoint holds one process's random numbers alone.
            torch.manual_seed(self.args.seed + self.rank.index + self.state.global_step * self.rank.of)
        loss = None
        while loss is None:
            smaller = None
            # One more size takes longer to capture than some tokens of filler: 1.3 to 1.9 s, a step 0.35 s, on an H200.
            captured = self._replay.sizes if self._replay else ()
            whole = lay_out(units.each, self.fit, self.args.device, self.rank, captured)
            try:
                loss = self._attempt(model, whole)
            except torch.OutOfMemoryError:
                smaller = fits.tighter(self.fit, len(packed_model.backbone(self._bare(model)).layers))
                if smaller is None:
                    raise
            # Not while the error is handled: it holds the frames that hold the memory.
            if smaller:
                self._shrink(model, smaller)
            if self.rank.of > 1:
                loss = self._sum(model, units, loss)
        self.count(whole.tokens)
        self.done("train", whole)
        return loss

    def _attempt(self, model: Any, whole: Step) -> torch.Tensor:
        total = torch.zeros((), device=self.args.device)
        for batch in whole.batches:
            loss = self.losses(model, batch, whole)
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _sum(self, model: Any, units: Units, loss: torch.Tensor | None) -> torch.Tensor | None:
        """Adds the gradients and losses of all processes up. None where one of them had no memory for the step, which
        is then to be done again by all. Raises TrainingError where they are not at the same step."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        seen = float(hash(tuple(tuple(ids) for unit in units.each for ids, _ in unit)) & 0xFFFF)
        stop = self.rank.leads and self.progress.stop_requested()
        said = torch.tensor([0.0, loss is None, stop, seen], device=self.args.device)
        if loss is not None:
            said[0] = loss
        flat = torch.cat([*(_gradient(each) for each in trained), said])
        # accelerate adds up in a copy: the card must not hold the gradients a third time.
        for parameter in trained:
            parameter.grad = None
        flat = self.accelerator.reduce(flat, "sum")
        *summed, said = flat.split([*(each.numel() for each in trained), len(said)])
        value, short, stop, seen_by_all = said.tolist()
        if seen_by_all != seen * self.rank.of:
            raise TrainingError("The processes of this training do not read the same steps. This is a bug.")
        if short:
            model.zero_grad(set_to_none=True)
            self.forget()
            return None
        for parameter, gradient in zip(trained, summed, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
        self._told_to_stop = bool(stop)
        return torch.tensor(value, device=self.args.device)

    def stop_requested(self) -> bool:
        return self._told_to_stop if self.rank.of > 1 else super().stop_requested()

    def _shrink(self, model: Any, smaller: Fit) -> None:
        self.progress.say(
            f"Out of GPU memory with {self.fit.tokens:,} tokens at once and {self.fit.recomputed} layers recomputed"
            f"{', captured' * self.fit.captured}. The step is done again with {smaller.tokens:,} tokens and "
            f"{smaller.recomputed} layers recomputed, not captured."
        )
        self._replay = None
        model.zero_grad(set_to_none=True)
        self.forget()
        self.fit = smaller
        packed_model.recompute(self._bare(model), smaller.recomputed)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def forget(self) -> None:
        """What an attempt that failed has noted."""

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        units: Units = inputs["units"]
        whole = lay_out(units.each, self.fit, self.args.device, self.rank)
        total = torch.zeros((), device=self.args.device)
        with torch.no_grad():
            for batch in whole.batches:
                total += self.losses(model, batch, whole)
        if self.rank.of > 1:
            total = self.accelerator.reduce(total, "sum")
        self.done("eval", whole)
        return total, None, None


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """(numbers,), float32: zeros where the process had nothing to do."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.reshape(-1).float()


class PackedSft(Packed):
    """The mean negative log-likelihood of the step's learned tokens: each counts alike, however the step was cut."""

    def losses(self, model: Any, batch: Batch, whole: Step) -> torch.Tensor:
        return -self.logprobs(model, batch).sum() / whole.scored


class PackedDpo(Packed):
    """DPO's loss, the mean over the step's pairs; the reference is TRL's frozen copy of the adapter. Of a batch's rows,
    chosen and rejected take turns."""

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self._rewards: list[torch.Tensor] = []
        self._pair: Any = None

    def losses(self, model: Any, batch: Batch, whole: Step) -> torch.Tensor:
        # The reference first: a captured graph holds one batch's activations at a time.
        reference = self._reference(model, batch)
        policy = sequence_logprobs(self.logprobs(model, batch), batch)
        each, rewards = preference_loss(policy, reference, self.beta)
        self._rewards.append(rewards.detach())
        return each.sum() / whole.units

    def _reference(self, model: Any, batch: Batch) -> torch.Tensor:
        """The same sums under the frozen copy's weights, by the same kernels: with another pass, made for inference or
        outside of a captured graph, equal weights would differ by bfloat16's rounding."""
        policy, reference = self._two(self.accelerator.unwrap_model(model))
        with torch.no_grad():
            kept = torch._foreach_mul(policy, 1.0)
            torch._foreach_copy_(policy, reference)
        try:
            return sequence_logprobs(self.logprobs(model, batch), batch).detach()
        finally:
            with torch.no_grad():
                torch._foreach_copy_(policy, kept)

    def _two(self, adapted: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The policy's weights, and TRL's frozen copy of what they were."""
        if not self._pair:
            named = [(name, each) for name, each in adapted.named_parameters() if ".default." in name]
            copies = [adapted.get_parameter(name.replace(".default.", ".ref.")) for name, _ in named]
            self._pair = [each for _, each in named], copies
        return self._pair

    def forget(self) -> None:
        self._rewards.clear()

    def done(self, mode: str, whole: Step) -> None:
        chosen, rejected = torch.cat(self._rewards).unbind(dim=1)
        self._rewards.clear()
        means = torch.stack([chosen, rejected, chosen - rejected, (chosen > rejected).float()]).mean(dim=1).tolist()
        for name, value in zip(("chosen", "rejected", "margins", "accuracies"), means, strict=True):
            self._metrics[mode][f"rewards/{name}"].append(value)


def sequence_logprobs(logprobs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(scored,) → (filled rows,), the sum of each row's. Summed in a fixed order, so that equal models agree to the
    bit."""
    own = batch.owner[None] == torch.arange(batch.filled, device=logprobs.device)[:, None]
    return torch.where(own, logprobs[None], 0).sum(dim=1)


def preference_loss(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """-log σ(β · ((π - ref) of chosen - (π - ref) of rejected)), Rafailov et al. 2023, equation 7.

    Sums of log-probabilities, chosen and rejected in turn (pairs × 2,) → each pair's loss (pairs,) and its rewards
    (pairs, 2)."""
    rewards = beta * (policy - reference).view(-1, 2)
    return -functional.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards
