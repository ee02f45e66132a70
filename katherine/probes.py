"""Probe sets, and how an answer is scored: by the rules each probe declares, never by a hidden judge. What no rule
can decide is for a person. What answers is speakers' business."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from katherine import bases, speakers
from katherine import export as exports
from katherine.errors import DataError, NotFound
from katherine.examples import Message
from katherine.progress import Progress, Stopped
from katherine.recipe import ProbeRecipe
from katherine.settings import home
from katherine.speakers import Reply, Speaker
from katherine.template import ChatTemplate

SAMPLE = Path(__file__).parent / "sample"
# Text that only a model thinking aloud writes; every probe is held to its absence, declared or not.
_THINKING = re.compile(r"</?think(ing)?>", re.I)


class Probe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question (`ask`) or a longer talk (`turns`, each asked in order, the last answer scored).

    must: regular expressions that all match the answer; must_not: none does; max_words: a ceiling.
    compare: also put to the base and the adapters, to show before and after.
    """

    id: str
    category: str
    why: str
    ask: str | None = None
    turns: tuple[str, ...] = ()
    must: tuple[str, ...] = ()
    must_not: tuple[str, ...] = ()
    max_words: int | None = None
    compare: bool = False

    @property
    def questions(self) -> tuple[str, ...]:
        return (self.ask,) if self.ask else self.turns


class ProbeSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    description: str
    probe: tuple[Probe, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """reasons: every rule that was broken, in words; empty where the probe passed."""

    passed: bool
    reasons: tuple[str, ...]


def load(name: str) -> ProbeSet:
    """A probe set by name (of the sample folder) or path. Raises NotFound, or DataError naming probe and field."""
    path = Path(name)
    if path.suffix != ".toml":
        path = SAMPLE / "probes.toml"
        if not path.is_file() or tomllib.loads(path.read_text(encoding="utf-8")).get("name") != name:
            raise NotFound(f"There is no probe set {name!r}: give katherine, or the path of a .toml file.")
    if not path.is_file():
        raise NotFound(f"There is no file {path}: check the probe set's path.")
    try:
        found = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), ProbeSet)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise DataError(f"{path} is not a probe set: {error}.") from error
    if wrong := [f"{path}, {problem}" for problem in _problems(found)]:
        raise DataError("\n".join(wrong))
    return found


def _problems(probes: ProbeSet) -> list[str]:
    found = [] if probes.probe else ["the set: it has no [[probe]]."]
    seen: set[str] = set()
    for probe in probes.probe:
        if probe.id in seen:
            found.append(f"probe {probe.id!r}: the id is used twice.")
        seen.add(probe.id)
        if bool(probe.ask) == bool(probe.turns):
            found.append(f"probe {probe.id!r}: give either ask or turns.")
        for rule in probe.must + probe.must_not:
            try:
                re.compile(rule)
            except re.error as error:
                found.append(f"probe {probe.id!r}: {rule!r} is not a regular expression ({error}).")
        if not (probe.must or probe.must_not or probe.max_words):
            found.append(f"probe {probe.id!r}: it has no rule (must, must_not or max_words), so nothing is scored.")
    return found


def score(probe: Probe, reply: Reply) -> Score:
    """Every rule, the two that hold for all probes included: it ends by itself, and does not think aloud."""
    text, broken = reply.text.strip(), []
    if not text:
        broken.append("said nothing")
    if not reply.ended:
        broken.append(f"did not end by itself within {reply.tokens} tokens")
    if found := _THINKING.search(text):
        broken.append(f"thought aloud: {found.group()!r}")
    broken += [f"lacks {rule!r}" for rule in probe.must if not re.search(rule, text)]
    for rule in probe.must_not:
        if found := re.search(rule, text):
            broken.append(f"says {found.group()!r}, against {rule!r}")
    if probe.max_words is not None and (words := len(text.split())) > probe.max_words:
        broken.append(f"has {words} words, more than {probe.max_words}")
    return Score(not broken, tuple(broken))


def ask(
    speaker: Speaker, template: ChatTemplate, probes: Sequence[Probe], recipe: ProbeRecipe
) -> dict[str, tuple[list[Message], Reply]]:
    """Puts every probe to one model: probe id → (the whole talk, the last reply). Probes of equal length are asked
    together, turn by turn, so that a model that can answer many at once does."""
    talks: dict[str, list[Message]] = {probe.id: [] for probe in probes}
    last: dict[str, Reply] = {}
    for turn in range(max(len(probe.questions) for probe in probes)):
        asked = [probe for probe in probes if turn < len(probe.questions)]
        for probe in asked:
            talks[probe.id].append(Message("user", probe.questions[turn]))
        replies = speaker.replies(
            [template.prompt(talks[probe.id]) for probe in asked],
            max_new_tokens=recipe.max_new_tokens,
            temperature=recipe.temperature,
            seed=recipe.seed,
        )
        for probe, reply in zip(asked, replies, strict=True):
            talks[probe.id].append(Message("assistant", reply.text))
            last[probe.id] = reply
    return {probe.id: (talks[probe.id], last[probe.id]) for probe in probes}


def run(
    export: Path, adapters: Mapping[str, Path], recipe: ProbeRecipe, out: Path, progress: Progress
) -> dict[str, Any]:
    """Puts a probe set to every GGUF that `export` (an export run's out folder) offers, and, with recipe.stages, the
    probes marked compare to the base and to `adapters` (stage → adapter folder, in their order) as well.

    Writes out/answers.jsonl. Returns {"models": {name: {"asked", "passed"}}, "answers": {question: {model: text}}}.
    Raises NotFound or DataError where no file is offered, EngineError where one cannot be asked.
    """
    chosen = load(recipe.probes)
    manifest = export / "gguf" / exports.MANIFEST
    files = exports.offered(manifest)
    if not files and not (recipe.stages and adapters):
        raise DataError(f"{manifest} offers no file: each failed a check or was changed. See the acceptance table.")
    template = ChatTemplate.load(bases.tokenizer(home(), msgspec.json.decode(manifest.read_bytes())["base"]))
    compared = [probe for probe in chosen.probe if probe.compare]
    record = Record(out)
    with record:
        if recipe.stages and adapters and compared:
            progress.phase("load the base and its adapters")
            with speakers.stages(adapters, template, progress) as models:
                for name, speaker in models.items():
                    record.add(name, compared, _put(name, speaker, template, compared, recipe, progress))
        for done, file in enumerate(files):
            progress.step(done, len(files))
            name = file["quant"]
            with speakers.gguf(Path(file["path"])) as quant:
                record.add(name, chosen.probe, _put(name, quant, template, chosen.probe, recipe, progress))
    return {"models": record.summary, "answers": record.answers}


def _put(
    name: str,
    speaker: Speaker,
    template: ChatTemplate,
    probes: Sequence[Probe],
    recipe: ProbeRecipe,
    progress: Progress,
) -> dict[str, tuple[list[Message], Reply]]:
    if progress.stop_requested():
        raise Stopped
    progress.phase(f"ask {name}")
    return ask(speaker, template, probes, recipe)


class Answer(msgspec.Struct, frozen=True):
    """One line of answers.jsonl: what a model said to a probe. talk: all turns, the last answer included."""

    model: str
    probe: str
    category: str
    talk: tuple[Message, ...]
    score: Score


def answers(out: Path) -> list[Answer]:
    """What a probe run's out folder recorded, in the order in which it was asked; [] before there is anything. Raises
    DataError for a damaged file."""
    path = out / "answers.jsonl"
    try:
        return [_answer(line) for line in path.read_bytes().split(b"\n") if line]
    except FileNotFoundError:
        return []
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}): run the probes again.") from error


_answer = msgspec.json.Decoder(Answer).decode


class Record:
    """The answers of a probe run: one line each in answers.jsonl, counts by model, and the answers to compare."""

    def __init__(self, out: Path):
        self._path = out / "answers.jsonl"
        self.summary: dict[str, dict[str, int]] = {}
        self.answers: dict[str, dict[str, str]] = {}

    def __enter__(self) -> "Record":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def add(self, model: str, probes: Sequence[Probe], given: Mapping[str, tuple[list[Message], Reply]]) -> None:
        passed = 0
        for probe in probes:
            talk, reply = given[probe.id]
            result = score(probe, reply)
            passed += result.passed
            row = {"model": model, "probe": probe.id, "category": probe.category, "talk": talk}
            self._lines.write(msgspec.json.encode(row | {"reply": asdict(reply), "score": asdict(result)}) + b"\n")
            if probe.compare:
                self.answers.setdefault(probe.questions[-1], {})[model] = reply.text
        self._lines.flush()
        self.summary[model] = {"asked": len(probes), "passed": passed}
