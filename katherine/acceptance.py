"""Whether an exported GGUF may be offered: each check with its finding, made in a child process on real examples.
What a failing file means for the export is export's business."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from katherine.engines import CONTEXT, Engine
from katherine.errors import EngineError
from katherine.examples import Conversation, Message
from katherine.gguf import UNQUANTISED, types
from katherine.progress import Progress, Stopped
from katherine.recipe import ExportRecipe
from katherine.template import ChatTemplate, Rendered

# Greedy decoding can loop on a prompt where sampling would not: seen with 1 of 8 on the small base. So one in ten may
# run on; where the end-of-turn is wrong in the file or was not learned, nearly all do.
MAY_RUN_ON = 0.1
# With fewer examples a tenth is none; from here on one may, since one loop in so few says little.
ONE_MAY_RUN_ON = 8
# With all layers on a GPU the processor looks tokens up and no more; threads that wait for each other would suffer from
# those that quantise meanwhile.
GPU_THREADS = 2
# As many failures as a finding names.
_NAMED = 3
_WIDE = ("f32", "f16", "bf16")


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    passed: bool
    finding: str


@dataclass(slots=True)
class Examined:
    """What was found about one file. perplexity, kl (nats a token) and top1 (share) are None where not measured or
    not finite."""

    meta: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None

    @property
    def accepted(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def bits_per_weight(self) -> float | None:
        return self.meta["tensor_bytes"] * 8 / self.meta["parameters"] if self.meta else None


@dataclass(frozen=True, slots=True)
class Example:
    """A real conversation as the model reads it, and the learned positions whose log-probabilities are compared;
    `row` is where those begin in the reference."""

    conversation: Conversation
    rendered: Rendered
    positions: list[int]
    row: int

    @property
    def prompt_messages(self) -> Sequence[Message]:
        """The turns before the last reply."""
        return self.conversation.messages[:-1]


def choose(template: ChatTemplate, conversations: Sequence[Conversation], recipe: ExportRecipe) -> list[Example]:
    """`recipe.check_examples` conversations spread evenly over the data, so that each part of it is heard, with at
    most `recipe.check_tokens` learned positions in all. What exceeds an engine's context is left out."""
    fitting = []
    for conversation in conversations:
        rendered = template.training(conversation)
        if len(rendered.ids) + recipe.max_new_tokens <= CONTEXT:
            fitting.append((conversation, rendered))
    count = min(recipe.check_examples, len(fitting))
    examples: list[Example] = []
    row = 0
    for index in range(count):
        conversation, rendered = fitting[index * len(fitting) // count]
        positions = [i for i, learned in enumerate(rendered.learned) if learned and i]
        positions = positions[: recipe.check_tokens - row]
        examples.append(Example(conversation, rendered, positions, row))
        row += len(positions)
    return examples


def examine(
    path: Path,
    quant: str,
    template: ChatTemplate,
    examples: list[Example],
    recipe: ExportRecipe,
    progress: Progress,
    *,
    reference: Path,
    tensors: int,
    architecture: str | None = None,
    on_gpu: bool = False,
) -> Examined:
    """Checks one file. The unquantised one writes its log-probabilities to `reference`, an existing file (float32, one
    row a learned position); the others are compared with it.

    `tensors` and `architecture` are what the file must have. `on_gpu`: others may have the cores. Never raises for a
    bad file: a file that cannot be loaded, or dies on the way, has that as its failing check. Raises Stopped.
    """
    found = Examined()
    needed = max(len(e.rendered.ids) for e in examples) + recipe.max_new_tokens
    try:
        threads = GPU_THREADS if on_gpu else None
        with Engine(path, context=needed, check_tensors=True, threads=threads) as engine:
            found.meta = engine.meta()
            found.checks.append(Check("loads", True, f"loads in a process of its own, {found.meta['context']} tokens"))
            found.checks += _identity(found, quant, tensors, architecture)
            found.checks.append(_template(found.meta, template))
            found.checks.append(_tokens(engine, template, examples))
            steps = _Steps(progress, 2 * len(examples))
            found.checks += _replies(engine, template, examples, recipe, steps)
            found.checks += _likelihood(engine, examples, recipe, reference, found, quant == UNQUANTISED, steps)
    except EngineError as error:
        found.checks.append(Check("runs" if found.meta else "loads", False, str(error)))
    return found


class _Steps:
    def __init__(self, progress: Progress, of: int):
        self.progress, self.of, self.done = progress, of, 0

    def over(self, examples: list[Example]) -> Iterator[Example]:
        for example in examples:
            if self.progress.stop_requested():
                raise Stopped
            yield example
            self.done += 1
            self.progress.step(self.done, self.of)


def _identity(found: Examined, quant: str, tensors: int, architecture: str | None) -> Iterator[Check]:
    meta = found.meta
    name = meta["architecture"]
    wanted = architecture or name
    yield Check("architecture", bool(name) and name == wanted, f"{name or 'none'}, expected {wanted or 'one'}")
    yield Check("tensors", meta["tensors"] == tensors, f"{meta['tensors']} tensors, expected {tensors}")
    bits = found.bits_per_weight or math.inf
    number = types()[quant]
    small = quant in _WIDE or bits < 16
    yield Check(
        "size",
        meta["file_type"] == number and small,
        f"{bits:.2f} bits per weight; file type {meta['file_type']}, {quant} is {number}",
    )


def _template(meta: dict[str, Any], template: ChatTemplate) -> Check:
    wrong = []
    if meta["template"] != template.baked:
        wrong.append("the embedded chat template is not the baked one")
    if meta["end_of_turn"] != template.end_of_turn_id:
        wrong.append(
            f"replies end at token {meta['end_of_turn']}, but were trained to end at {template.end_of_turn_id}"
        )
    if meta["adds_begin"] and not template.begin:
        wrong.append("other programs would put a token before the prompt that training did not have")
    return Check("template", not wrong, "; ".join(wrong) or "the baked template and end-of-turn are embedded")


def _tokens(engine: Engine, template: ChatTemplate, examples: list[Example]) -> Check:
    """The file's own tokenizer against the one of training: rendered prompts with their control tokens, and replies
    as plain text. A prompt without an earlier reply must also give the very ids that training had."""
    wrong = []
    apart = 0
    for example in examples:
        messages = example.prompt_messages
        reply = example.conversation.messages[-1].content
        text = template.text(messages, generate=True)
        theirs = engine.tokenize(text, special=True)
        if theirs != template.tokenizer.encode(text, add_special_tokens=False).ids:
            wrong.append(f"the prompt of {_named(example)} has other ids in the file")
        elif theirs != template.prompt(messages):
            # Text cannot say that a control token was typed, nor where one reply's tokens began: the ids can.
            apart += 1
            if len(messages) == 1 and not _has_control(template, messages[0].content):
                wrong.append(f"the prompt of {_named(example)} has other ids as text than in training")
        if engine.tokenize(reply.strip()) != template.reply(reply)[:-1]:
            wrong.append(f"the reply to {_named(example)} has other ids in the file")
    finding = f"{len(examples)} prompts and replies have the same ids in the file as in training"
    if apart:
        finding += f"; {apart} of them only as ids, since a program that reads them as text splits them otherwise"
    return Check("tokens", not wrong, "; ".join(wrong[:_NAMED]) or finding)


def _has_control(template: ChatTemplate, text: str) -> bool:
    return any(token.content in text for token in template.tokenizer.get_added_tokens_decoder().values())


def _named(example: Example) -> str:
    asked = example.prompt_messages[-1].content.strip() if example.prompt_messages else "nothing"
    return repr(asked if len(asked) <= 60 else asked[:57] + "...")


def _replies(
    engine: Engine, template: ChatTemplate, examples: list[Example], recipe: ExportRecipe, steps: _Steps
) -> Iterator[Check]:
    running, thinking = [], []
    longest = 0
    for example in steps.over(examples):
        reply = engine.complete(template.prompt(example.prompt_messages), max_new_tokens=recipe.max_new_tokens)
        longest = max(longest, reply.finish.tokens)
        if reply.finish.end_token != template.end_of_turn_id:
            running.append(f"{_named(example)} did not end within {recipe.max_new_tokens} tokens")
        elif not reply.text.strip():
            running.append(f"{_named(example)} got an empty reply")
        if "<think" in reply.text:
            thinking.append(_named(example))
    ended = len(examples) - len(running)
    allowed = max(int(len(examples) * MAY_RUN_ON), int(len(examples) >= ONE_MAY_RUN_ON))
    finding = f"{ended} of {len(examples)} greedy replies end by themselves ({allowed} may run on), "
    finding += f"the longest has {longest} tokens"
    if running:
        finding += "; " + "; ".join(running[:_NAMED])
    yield Check("ends", len(running) <= allowed, finding)
    thought = f"a thought opens in the reply to {', '.join(thinking[:_NAMED])}"
    yield Check("no_thought", not thinking, thought if thinking else "no reply opens a thought")


def _likelihood(
    engine: Engine,
    examples: list[Example],
    recipe: ExportRecipe,
    reference: Path,
    found: Examined,
    unquantised: bool,
    steps: _Steps,
) -> Iterator[Check]:
    logprobs: list[float] = []
    kl: list[float] = []
    same: list[float] = []
    for example in steps.over(examples):
        if not example.positions:
            continue
        score = engine.score(
            example.rendered.ids, example.positions, reference=reference, row=example.row, write=unquantised
        )
        logprobs += score.logprobs
        kl += score.kl
        same += score.same
    # Far past any sensible value the exponential overflows: that is infinitely surprised, not an error.
    mean = -math.fsum(logprobs) / len(logprobs)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    found.perplexity = perplexity if math.isfinite(perplexity) else None
    tokens = f"{len(logprobs)} tokens of the persona's own words"
    yield Check("perplexity", found.perplexity is not None, f"{perplexity:.3f} on {tokens}")
    if unquantised:
        return
    divergence = math.fsum(kl) / len(kl)
    found.kl, found.top1 = divergence if math.isfinite(divergence) else None, math.fsum(same) / len(same)
    yield Check(
        "kl",
        divergence <= recipe.max_kl,
        f"{divergence:.4f} nats a token from the unquantised file (at most {recipe.max_kl}), the same first choice at "
        f"{found.top1:.1%} of {tokens}",
    )
