"""What questions are put to: a GGUF in its engine, or a base in this process, bare or with one of its adapters.
All answer prompts of token ids; how a prompt is made is template's business, and what is asked probes'."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from katherine import adapters, engines
from katherine.progress import Progress
from katherine.settings import home
from katherine.template import ChatTemplate

# Rows answered together by a model in this process: as many as the demo's probes that are compared, and small beside
# the weights of any base.
_TOGETHER = 16


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said. ended: by its own end-of-turn, not cut at the limit. tokens: generated, that one included."""

    text: str
    ended: bool
    tokens: int


class Speaker(Protocol):
    """Anything that answers prompts: one reply a prompt, in their order."""

    def replies(
        self, prompts: Sequence[list[int]], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Reply]: ...


class GgufSpeaker:
    """Answers one prompt after another, as a person's chat would."""

    def __init__(self, engine: engines.Engine):
        self._engine = engine

    def replies(
        self, prompts: Sequence[list[int]], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Reply]:
        found = []
        for prompt in prompts:
            said = self._engine.complete(prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
            found.append(Reply(said.text, said.finish.finish == "end", said.finish.tokens))
        return found


@contextlib.contextmanager
def gguf(path: Path) -> Iterator[GgufSpeaker]:
    """Raises NotFound or EngineError, as engines.Engine does."""
    with engines.Engine(path) as engine:
        yield GgufSpeaker(engine)


class StageSpeaker:
    """A base with one adapter switched on, or bare; answers many prompts at once."""

    def __init__(self, model: Any, adapter: str | None, template: ChatTemplate):
        self._model = model
        self._adapter = adapter
        self._template = template

    def replies(
        self, prompts: Sequence[list[int]], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Reply]:
        import torch

        torch.manual_seed(seed)
        if self._adapter:
            self._model.set_adapter(self._adapter)
        found: list[Reply] = []
        with contextlib.nullcontext() if self._adapter else self._model.disable_adapter():
            for start in range(0, len(prompts), _TOGETHER):
                found += self._together(prompts[start : start + _TOGETHER], max_new_tokens, temperature)
        return found

    def _together(self, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float) -> list[Reply]:
        import torch

        end = self._template.end_of_turn_id
        width = max(map(len, prompts))
        # On the left, so that every reply begins at the same column.
        ids = torch.tensor([[end] * (width - len(p)) + p for p in prompts], device=self._model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._model.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        with torch.inference_mode():
            given = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=end,
                pad_token_id=end,
                **sampling,
            )
        found = []
        for row in given[:, width:].tolist():
            ended = end in row
            words = row[: row.index(end)] if ended else row
            found.append(Reply(self._template.tokenizer.decode(words), ended, len(words) + ended))
        return found


@contextlib.contextmanager
def stages(
    trained: Mapping[str, Path], template: ChatTemplate, progress: Progress
) -> Iterator[dict[str, StageSpeaker]]:
    """The base, and each adapter of `trained` (name → folder) on it: one base in memory serves them all. Raises
    NotFound, SetupError or ModelError where an adapter does not fit."""
    from katherine import model

    model.settle(home(), progress)
    names = list(trained)
    base = adapters.base_of(home(), trained[names[0]])
    loaded = model.with_adapter(base, trained[names[0]], name=names[0])
    for name in names[1:]:
        loaded.load_adapter(str(trained[name]), name)
    yield {"base": StageSpeaker(loaded, None, template)} | {n: StageSpeaker(loaded, n, template) for n in names}
