"""What SFT and DPO share: checkpoints that are whole or absent, resuming, metrics as they happen, stopping, the
held-out split, averaging and EMA. Each trainer's own loss and data are the business of sft and dpo."""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from katherine import adapters, checkpoints, memory
from katherine import model as models
from katherine.checkpoints import Checkpoints, sync
from katherine.errors import DataError, TemplateError, TrainingError
from katherine.progress import Progress, Stopped
from katherine.recipe import DpoRecipe, SftRecipe
from katherine.template import Parity

_EMA = "ema.safetensors"


# ---------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True)
class Sequences:
    """Tokenised rows in the trainer's columns. `too_long` examples were left out."""

    train: list[dict[str, list[int]]]
    held_out: list[dict[str, list[int]]]
    too_long: int

    @property
    def fingerprint(self) -> str:
        """Of the rows trained on, so that a checkpoint is never resumed on other data."""
        return hashlib.sha256(json.dumps(self.train).encode()).hexdigest()


def arrange(
    rows: Sequence[dict[str, list[int]]],
    length: Callable[[dict[str, list[int]]], int],
    recipe: SftRecipe | DpoRecipe,
    progress: Progress,
) -> Sequences:
    """Leaves out rows longer than max_length (a cut reply would teach the model never to end) and splits off the
    held-out share: which rows those are depends on their content and the seed, not on their order.

    Raises DataError where nothing is left to train on.
    """
    fitting = [row for row in rows if length(row) <= recipe.max_length]
    too_long = len(rows) - len(fitting)
    if too_long:
        progress.say(f"{too_long} of {len(rows)} examples are longer than max_length {recipe.max_length}: left out.")

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{recipe.seed}:{json.dumps(fitting[index], sort_keys=True)}".encode()).digest()

    aside = len(fitting) - recipe.trained_on(len(fitting))
    held_out = set(sorted(range(len(fitting)), key=rank)[:aside])
    train = [row for index, row in enumerate(fitting) if index not in held_out]
    if not train:
        raise DataError(
            f"No example is left to train on: {len(rows)} in the dataset, {too_long} longer than max_length "
            f"{recipe.max_length}, {aside} held out. Raise max_length or add examples."
        )
    if aside:
        progress.say(f"{aside} examples are held out and only evaluated.")
    return Sequences(train, [fitting[index] for index in sorted(held_out)], too_long)


class Ema:
    """Exponential moving average of the adapter's trained tensors, in float32 beside them."""

    def __init__(self, model: Any, decay: float):
        self.decay = decay
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and ".default." in n}
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    def update(self, step: int) -> None:
        """After `step` optimiser steps. The decay climbs to its value, or the untrained start would weigh too much
        in a short run: min(decay, (1 + step) / (10 + step)), as TensorFlow's ExponentialMovingAverage does."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.detach().float(), 1 - decay)

    def state(self) -> dict[str, Any]:
        return {name: value.cpu() for name, value in self.average.items()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in self.average.items():
            value.copy_(state[name])

    def swap_in(self) -> None:
        """Puts the average into the model."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.average[name])


# TRL's trainers, which this stands in front of, are imported when a run begins: unsloth must come before them.
_Trainer: Any = object


class Recorded(_Trainer):
    """Put before a trainer class: class Trainer(Recorded, trl.SFTTrainer). Set `progress`, `checkpoints` and `ema`
    before train()."""

    progress: Progress
    checkpoints: Checkpoints
    ema: Ema | None = None
    stopped = False
    _tokens: Any = 0
    _seconds_before = 0.0
    _started = _last_log = 0.0

    def train(self, *given: Any, **named: Any) -> Any:
        self._started = self._last_log = time.monotonic()
        return super().train(*given, **named)

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        # Stays on the device; it is read when the step is logged, which waits for the device anyway.
        self.count(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, *rest, **named)

    def count(self, tokens: Any) -> None:
        """Tokens that the step under way has looked at, without padding."""
        self._tokens = self._tokens + tokens

    def _maybe_log_save_evaluate(self, *rest: Any, **named: Any) -> None:
        """Called once when an optimiser step is done, and once more at each epoch's end."""
        step = self.state.global_step
        if self.control.should_log:
            if self.ema:
                self.ema.update(step)
            if step < self.state.max_steps and self.stop_requested():
                self.stopped = True
                self.control.should_save = self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(*rest, **named)
        self.progress.step(step, self.state.max_steps)

    def stop_requested(self) -> bool:
        return self.progress.stop_requested()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        now = time.monotonic()
        logs["seconds"] = round(self._seconds_before + now - self._started, 3)
        super().log(logs, start_time)
        row: dict[str, Any] = {"step": self.state.global_step, "epoch": logs.get("epoch"), "seconds": logs["seconds"]}
        if "loss" in logs:
            loss = row["loss"] = logs["loss"]
            row |= {name: logs[name] for name in ("learning_rate", "grad_norm")}
            row["tokens_per_second"] = round(int(self._tokens) / max(now - self._last_log, 1e-9), 1)
            row["memory_gib"] = round(_memory_gib(), 3)
            row |= {ours: logs[theirs] for theirs, ours in _PREFERENCE_METRICS.items() if theirs in logs}
        elif "eval_loss" in logs:
            loss = row["eval_loss"] = logs["eval_loss"]
            evaluated = {f"eval_{theirs}": f"eval_{ours}" for theirs, ours in _PREFERENCE_METRICS.items()}
            row |= {ours: logs[theirs] for theirs, ours in evaluated.items() if theirs in logs}
        else:
            return
        self._tokens, self._last_log = 0, now
        self.progress.metric(**row)
        if not math.isfinite(loss):
            raise TrainingError(
                f"The loss is {loss} at step {row['step']}: the training diverged. "
                "Lower learning_rate, or raise warmup_ratio."
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """In place of transformers' own, which writes file by file under the final name."""
        from safetensors.torch import save_file

        if not self.is_world_process_zero():
            return
        step = self.state.global_step
        with self.checkpoints.writing(step) as folder:
            adapters.save(self.model, models.adapter_weights(self.model), folder)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / "trainer_state.json"))
            if self.ema:
                save_file(self.ema.state(), folder / _EMA)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from safetensors.torch import load_file

        folder = Path(resume_from_checkpoint)
        models.set_adapter_weights(self.model, adapters.read_weights(folder), folder)
        if self.ema:
            self.ema.restore(load_file(folder / _EMA))
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        self._seconds_before = history[-1]["seconds"] if history else 0.0


# TRL's names → ours.
_PREFERENCE_METRICS = {
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
}


def _memory_gib() -> float:
    """The most memory this process has needed: reserved on the GPU where there is one, else resident, in GiB."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return memory.peak(os.getpid()) / 2**30


# --------------------------------------------------------------------------------------------------- a run


def arguments(
    recipe: SftRecipe | DpoRecipe, folder: Path, held_out: int, progress: Progress, fitted: bool = False
) -> dict[str, Any]:
    """The recipe in the words of transformers' TrainingArguments, for both of TRL's configs. held_out: examples to
    evaluate. fitted: the trainer is given whole steps, and cuts, recomputes and narrows by itself."""
    import torch

    cuda = torch.cuda.is_available()
    compute = models.compute_type()
    optim = recipe.optim
    if optim == "adamw_8bit" and not cuda:
        optim = "adamw_torch"
        progress.say("optim is adamw_torch here: adamw_8bit needs CUDA.")
    batch = recipe.effective_batch_size if fitted else recipe.per_device_batch_size
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        # All at once: each learned token counts alike, and the mean over batches is no other for several processes.
        "per_device_eval_batch_size": max(held_out, 1) if fitted else batch,
        "gradient_accumulation_steps": 1 if fitted else recipe.gradient_accumulation_steps,
        "num_train_epochs": recipe.num_train_epochs,
        "learning_rate": recipe.learning_rate,
        # below 1 it is a share of all steps
        "warmup_steps": recipe.warmup_ratio,
        "lr_scheduler_type": recipe.lr_scheduler_type,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "optim": optim,
        "max_length": recipe.max_length,
        "gradient_checkpointing": recipe.gradient_checkpointing and not fitted,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        # A fitted model computes in its own type throughout.
        "bf16": compute is torch.bfloat16 and not fitted,
        "fp16": compute is torch.float16 and not fitted,
        "use_cpu": not cuda,
        "logging_steps": 1,
        # a loss that is not a number must be seen, not replaced by the average so far
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": recipe.save_steps,
        "eval_strategy": "epoch" if held_out else "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": cuda,
    }


@contextmanager
def exact(loaded: Any) -> Iterator[None]:
    """Keeps the adapter's weights as they are while a trainer is made: TRL narrows those on a quantised base to
    bfloat16, and DPO's reference, copied before, would differ from the policy."""
    kept = {name: each.detach().clone() for name, each in loaded.named_parameters() if each.requires_grad}
    yield
    for name, each in loaded.named_parameters():
        if name in kept:
            each.data = kept[name]


def checkpoints_of(
    recipe: SftRecipe | DpoRecipe, sequences: Sequences, out: Path, progress: Progress, parent: str = ""
) -> Checkpoints:
    """The run's checkpoint folder. `parent` is whatever else the result depends on, as a hash."""
    whole = json.dumps([recipe.model_dump(mode="json"), sequences.fingerprint, parent], sort_keys=True)
    fingerprint = hashlib.sha256(whole.encode()).hexdigest()
    return Checkpoints(out / "checkpoints", max(checkpoints.KEEP, recipe.average_checkpoints), fingerprint, progress)


def run(
    trainer: Any,
    recipe: SftRecipe | DpoRecipe,
    kept: Checkpoints,
    base: adapters.Base,
    out: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Trains from the newest sound checkpoint, or from the start, and writes out/adapter if it is the first of its
    processes. Returns the logged rows, those of earlier attempts included.

    Raises Stopped once a requested stop has been checkpointed, TrainingError for a loss that diverged.
    """
    from transformers import PrinterCallback

    trainer.progress, trainer.checkpoints = progress, kept
    trainer.ema = Ema(trainer.model, recipe.ema_decay) if recipe.ema_decay else None
    leads = trainer.is_world_process_zero()
    newest = kept.newest(tidy=leads)
    if newest:
        progress.say(f"Resuming from {newest.name}.")
    progress.phase("train")
    # progress is the one that tells; transformers' own callback would print every row again
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    if trainer.stopped:
        raise Stopped(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, and kept")
    if not leads:
        return trainer.state.log_history

    progress.phase("save")
    if trainer.ema:
        trainer.ema.swap_in()
        progress.say(f"The adapter is the moving average of its weights (decay {recipe.ema_decay}).")
    weights = models.adapter_weights(trainer.model)
    if recipe.average_checkpoints > 1:
        weights = average([adapters.read_weights(kept.path(s)) for s in kept.steps()[-recipe.average_checkpoints :]])
        steps = ", ".join(str(s) for s in kept.steps()[-recipe.average_checkpoints :])
        progress.say(f"The adapter is the mean of the checkpoints at steps {steps}.")
    write_adapter(trainer.model, weights, base, out / "adapter")
    progress.say(f"The adapter is in {out / 'adapter'}.")
    return trainer.state.log_history


def average(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of adapters, tensor by tensor, summed in float32."""
    return {
        name: (sum(state[name].float() for state in states) / len(states)).to(states[0][name].dtype)
        for name in states[0]
    }


def write_adapter(model: Any, weights: dict[str, Any], base: adapters.Base, folder: Path) -> None:
    """The finished adapter and its base.json; the folder appears whole, and replaces one left by an earlier attempt."""
    for left in folder.parent.glob(".adapter-*"):
        shutil.rmtree(left)
    draft = Path(tempfile.mkdtemp(prefix=".adapter-", dir=folder.parent))
    adapters.save(model, weights, draft)
    adapters.write_base(draft, base)
    draft.chmod(0o755)
    sync(draft)
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)


def summary(history: Sequence[dict[str, Any]], sequences: Sequences) -> dict[str, Any]:
    """What SFT and DPO both report. Losses are None-free: a run that logged nothing never gets here."""
    rows = [row for row in history if "loss" in row]
    evaluated = [row["eval_loss"] for row in history if "eval_loss" in row]
    return {
        "steps": rows[-1]["step"],
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
        "seconds": rows[-1]["seconds"],
        "examples": len(sequences.train),
        "held_out": len(sequences.held_out),
        "too_long": sequences.too_long,
        "last_eval_loss": evaluated[-1] if evaluated else None,
    }


def proven(parity: Parity, remarks: Sequence[str], progress: Progress) -> None:
    """Logs what the template's proof found. Raises TemplateError where training and chat would read differently."""
    for remark in remarks:
        progress.say(remark)
    if not parity.holds:
        raise TemplateError(
            f"Training and chat would not see the same tokens in {len(parity.mismatches)} places, first: "
            f"{parity.mismatches[0]}. This base's template cannot be trained on."
        )
    progress.say(f"Training and chat see the same tokens: {parity.turns} replies in {parity.examples} examples.")
    if parity.reread:
        progress.say(
            f"{parity.reread} of their prompts are other tokens to a program that reads the rendered text anew; first: "
            f"{parity.reread_first}."
        )
