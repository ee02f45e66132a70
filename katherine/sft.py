"""Supervised fine-tuning: a dataset's conversations and a base → a LoRA adapter. The loss is TRL's; rendering is
template's, checkpoints and metrics are training's."""

from pathlib import Path
from typing import Any

from katherine import adapters, bases, corpus, fit, gpu, model, ranks, settings, targets, training
from katherine.checkpoints import Checkpoints
from katherine.fit import Fit
from katherine.progress import Progress
from katherine.recipe import SftRecipe
from katherine.template import ChatTemplate, Rendered


def row(rendered: Rendered) -> dict[str, list[int]]:
    """The trainer's columns: labels repeat the ids where they are learned, -100 elsewhere."""
    labels = [token if learned else -100 for token, learned in zip(rendered.ids, rendered.learned, strict=True)]
    return {"input_ids": rendered.ids, "labels": labels}


def unit(row: dict[str, list[int]]) -> tuple[tuple[list[int], list[bool]]]:
    """The trainer's columns as a step's unit: one row of ids, and which are learned."""
    return ((row["input_ids"], [label != -100 for label in row["labels"]]),)


def train(dataset: Path, recipe: SftRecipe, out: Path, progress: Progress) -> dict[str, Any]:
    """Trains, or goes on from the newest sound checkpoint in out/checkpoints; writes out/adapter.

    Returns steps, first_loss, last_loss, seconds, examples, held_out, too_long, last_eval_loss.
    Raises KatherineError for what a person can mend, Stopped after a requested stop was checkpointed.
    """
    progress.phase("load")
    checkpoint = bases.checkpoint(settings.home(), recipe.base)
    card = gpu.mine()
    fitted = fit.wanted(recipe, checkpoint, card, progress)
    rank = ranks.mine() if fitted else ranks.undivided()
    model.ready(settings.home(), progress, fitted=fitted)
    for line in targets.matches(checkpoint, recipe.target_modules).lines(recipe.lora_r):
        progress.say(line)
    template = ChatTemplate.load(checkpoint)
    conversations = corpus.conversations(dataset)
    training.proven(template.prove(conversations), template.remarks, progress)
    rows = [row(template.training(conversation)) for conversation in conversations]
    sequences = training.arrange(rows, lambda r: len(r["input_ids"]), recipe, progress)

    lora = adapters.Lora(recipe.lora_r, recipe.lora_alpha, recipe.lora_dropout, recipe.target_modules)
    layout = None
    if fitted:
        units = [len(row["input_ids"]) for row in sequences.train]
        layout = fit.lay_out(recipe, checkpoint, card, units, lora, recipe.load_in_4bit, progress, rank.of)
    loaded = model.load(
        checkpoint,
        lora,
        load_in_4bit=recipe.load_in_4bit,
        max_length=recipe.max_length,
        gradient_checkpointing=recipe.gradient_checkpointing,
        seed=recipe.seed,
        fit=layout,
    )
    kept = training.checkpoints_of(recipe, sequences, out, progress)
    progress.say(recipe.steps_explained(len(sequences.train) + len(sequences.held_out)))
    base = model.describe(recipe.base, checkpoint, recipe.load_in_4bit)
    with ranks.together(rank):
        made = trainer(loaded, checkpoint, sequences, recipe, kept, progress, layout)
        history = training.run(made, recipe, kept, base, out, progress)
    return training.summary(history, sequences)


def trainer(
    loaded: Any,
    checkpoint: Path,
    sequences: training.Sequences,
    recipe: SftRecipe,
    kept: Checkpoints,
    progress: Progress,
    layout: Fit | None = None,
) -> Any:
    """TRL's SFTTrainer over rows that are already tokenised and labelled, which it leaves as they are; with a layout,
    over whole steps of them, packed."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = model.tokenizer(checkpoint)
    collator: Any = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    parents: tuple[Any, ...] = (training.Recorded, SFTTrainer)
    if layout:
        from katherine import steps

        collator, parents = steps.collate(unit), (steps.PackedSft, *parents)
    with training.exact(loaded):
        return type("Trainer", parents, {"fit": layout})(
            model=loaded,
            args=SFTConfig(
                **training.arguments(recipe, kept.folder, len(sequences.held_out), progress, layout is not None),
                packing=False,
                # unsloth switches it on unless told otherwise
                padding_free=False,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=Dataset.from_list(sequences.train),
            eval_dataset=Dataset.from_list(sequences.held_out) if sequences.held_out else None,
            data_collator=collator,
            processing_class=tokenizer,
        )
