"""Direct preference optimisation of an SFT adapter: a dataset's pairs and that adapter → a new adapter. The loss is
TRL's, its reference a frozen copy of the adapter as it came; what SFT and DPO share is training's."""

import hashlib
from pathlib import Path
from typing import Any

from katherine import adapters, corpus, fit, gpu, model, settings, training
from katherine.checkpoints import Checkpoints
from katherine.examples import Conversation
from katherine.fit import Fit
from katherine.progress import Progress
from katherine.recipe import DpoRecipe
from katherine.template import ChatTemplate, RenderedPair


def row(pair: RenderedPair) -> dict[str, list[int]]:
    """The trainer's columns."""
    return {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}


def unit(row: dict[str, list[int]]) -> tuple[tuple[list[int], list[bool]], ...]:
    """The trainer's columns as a step's unit: the chosen row and the rejected one, each with what is learned."""
    prompt = row["prompt_ids"]
    return tuple(
        (prompt + row[name], [False] * len(prompt) + [True] * len(row[name])) for name in ("chosen_ids", "rejected_ids")
    )


def _length(row: dict[str, list[int]]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def train(dataset: Path, adapter: Path, recipe: DpoRecipe, out: Path, progress: Progress) -> dict[str, Any]:
    """Trains on from `adapter`, or goes on from the newest sound checkpoint in out/checkpoints; writes out/adapter.

    Returns what sft.train does, and first_margin, last_margin, first_rewards (chosen, rejected), last_accuracy.
    Raises KatherineError for what a person can mend, Stopped after a requested stop was checkpointed.
    """
    progress.phase("load")
    base = adapters.base_of(settings.home(), adapter)
    checkpoint = Path(base.checkpoint)
    card = gpu.mine()
    fitted = fit.wanted(recipe, checkpoint, card, progress)
    model.ready(settings.home(), progress, fitted=fitted)
    progress.say(f"Going on from {adapter}, trained on {base.name}{' in 4 bit' if base.load_in_4bit else ''}.")
    template = ChatTemplate.load(checkpoint)
    preferences = corpus.preferences(dataset)
    training.proven(
        template.prove(Conversation((*p.prompt, *p.chosen)) for p in preferences), template.remarks, progress
    )
    rows = [row(template.pair(preference)) for preference in preferences]
    sequences = training.arrange(rows, _length, recipe, progress)

    lora = adapters.lora_of(adapter)
    layout = None
    if fitted:
        units = [sum(len(ids) for ids, _ in unit(row)) for row in sequences.train]
        layout = fit.lay_out(recipe, checkpoint, card, units, lora, base.load_in_4bit, progress)
    loaded = model.load(
        checkpoint,
        lora,
        load_in_4bit=base.load_in_4bit,
        max_length=recipe.max_length,
        gradient_checkpointing=recipe.gradient_checkpointing,
        seed=recipe.seed,
        fit=layout,
    )
    weights = adapter / adapters.WEIGHTS
    model.set_adapter_weights(loaded, adapters.read_weights(adapter), adapter)
    parent = hashlib.sha256(weights.read_bytes()).hexdigest()
    kept = training.checkpoints_of(recipe, sequences, out, progress, parent)
    made = trainer(loaded, checkpoint, sequences, recipe, kept, progress, layout)
    progress.say(recipe.steps_explained(len(sequences.train) + len(sequences.held_out)))
    history = training.run(made, recipe, kept, base, out, progress)
    logged = [entry for entry in history if "loss" in entry]
    return training.summary(history, sequences) | {
        "first_margin": logged[0]["rewards/margins"],
        "last_margin": logged[-1]["rewards/margins"],
        "first_rewards": [logged[0]["rewards/chosen"], logged[0]["rewards/rejected"]],
        "last_accuracy": logged[-1]["rewards/accuracies"],
    }


def trainer(
    loaded: Any,
    checkpoint: Path,
    sequences: training.Sequences,
    recipe: DpoRecipe,
    kept: Checkpoints,
    progress: Progress,
    layout: Fit | None = None,
) -> Any:
    """TRL's DPOTrainer over pairs that are already tokenised. It copies the adapter as the reference when it is
    made, before a checkpoint is loaded: a resumed run compares with the same SFT model."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    tokenizer = model.tokenizer(checkpoint)
    collator: Any = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
    parents: tuple[Any, ...] = (training.Recorded, DPOTrainer)
    if layout:
        from katherine import steps

        collator, parents = steps.collate(unit), (steps.PackedDpo, *parents)
    with training.exact(loaded):
        return type("Trainer", parents, {"fit": layout, "_prepare_dataset": lambda self, dataset, *_: dataset})(
            model=loaded,
            args=DPOConfig(
                **training.arguments(recipe, kept.folder, len(sequences.held_out), progress, layout is not None),
                beta=recipe.beta,
                # the reference runs without dropout, so the policy must too, or they would differ before a step is made
                disable_dropout=True,
            ),
            train_dataset=Dataset.from_list(sequences.train),
            eval_dataset=Dataset.from_list(sequences.held_out) if sequences.held_out else None,
            data_collator=collator,
            processing_class=tokenizer,
        )
