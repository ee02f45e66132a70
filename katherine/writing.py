"""From what was read to a dataset's files: the examples in use, what was left out and why, and the report's figures.
Reading is intake's; the folder's place and name are corpus's."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import msgspec

from katherine import findings
from katherine.errors import DataError
from katherine.examples import Conversation, Preference
from katherine.intake import BLOCK, Intake, Rows
from katherine.lines import Problem
from katherine.progress import Progress, Stopped

# Of a text in a list that a person goes through by eye: two lines of a wide screen.
SHOWN_PAIR = 240
# Examples between two looks at whether to stop; counting a thousand takes a fifth of a second.
OFTEN_COUNTED = 1024

_encode = msgspec.json.Encoder().encode
_conversation = msgspec.json.Decoder(Conversation).decode
_preference = msgspec.json.Decoder(Preference).decode


class ChatTemplate(Protocol):
    """What counts tokens here: a base's tokenizer and chat template, as training renders them."""

    def count(self, conversation: Conversation) -> int:
        """Tokens of the whole conversation."""

    def count_pair(self, preference: Preference) -> int:
        """Tokens of the prompt with the longer of the two replies."""


class Writing:
    """From what was read to sft.jsonl, dpo.jsonl and the report."""

    def __init__(
        self,
        draft: Path,
        intake: Intake,
        template: ChatTemplate | None,
        base: str | None,
        max_length: int,
        progress: Progress,
    ) -> None:
        self.draft = draft
        self.intake = intake
        self.template = template
        self.base = base
        self.max_length = max_length
        self.progress = progress
        self.written = 0
        self.of = 0
        self.hash = hashlib.sha256()
        self.refused: dict[int, int] = {}  # hash() of a rejected reply → the row of its pair

    def write(self, uncurated: bool | Collection[bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The report, and what the summary adds to it in place of the problems. The fingerprint is SHA-256 over the
        content hashes of the examples in use, in their order, each kind under its name and count.

        Raises DataError where only pairs are there that were not asked for."""
        intake = self.intake
        intake.spool.flush()
        used = list(intake.used_pairs(uncurated))
        curated = sum(tag is not None for row, tag in enumerate(intake.tags) if row not in intake.contradicted)
        others = len(intake.tags) - len(intake.contradicted) - curated
        if not used and not intake.sft.row:
            raise DataError(
                f"There is nothing here but {others} uncurated pairs, and these are left out unless asked for. "
                "Ask for uncurated pairs, or give them `_cat` and `_type`."
            )
        self.of = len(used) + len(intake.sft.row)
        pair_tokens, lengths = self._pairs(used)
        sft_tokens = self._conversations()
        self._uncurated({row for _, row in used})
        problems = intake.all_problems() + self._dataset_problems(lengths, used, uncurated)
        problems.sort(key=lambda p: (p.file, p.line or 0, p.reason))
        tokens = histograms = None
        if self.template is not None:
            pairs = findings.spread(pair_tokens, self.max_length)
            tokens = (findings.spread(sft_tokens, self.max_length) or pairs or {}) | {
                "max_length": self.max_length,
                "base": self.base,
                "pairs": pairs,
            }
            histograms = {"sft": findings.histogram(sft_tokens), "pairs": findings.histogram(pair_tokens)}
        report = {
            "options": {
                "include_uncurated": uncurated if isinstance(uncurated, bool) else sorted(h.hex() for h in uncurated),
                "left_out": [counts["file"] for counts in intake.by_file if counts.get("left_out")],
                "max_length": self.max_length,
                "base": self.base,
            },
            "files": sum(not counts.get("left_out") for counts in intake.by_file),
            "lines": sum(counts["lines"] for counts in intake.by_file),
            "sft": {
                "unique": len(intake.sft.row),
                "duplicates": intake.sft.duplicates,
                "rejected": intake.sft.rejected,
            },
            "dpo": {
                "curated": curated,
                "uncurated": others,
                "used": len(used),
                "duplicates": intake.dpo.duplicates,
                "rejected": intake.dpo.rejected,
                "lengths": lengths,
            },
            "unrecognised": intake.unrecognised,
            "tokens": tokens,
            "histograms": histograms,
            "fingerprint": self.hash.hexdigest(),
            "by_file": intake.by_file,
        }
        groups = self._problems(problems)
        return report | {"problems": msgspec.to_builtins(problems)}, report | {"problem_groups": groups}

    def _step(self) -> None:
        self.written += 1
        if not self.written % OFTEN_COUNTED:
            self.progress.step(self.written, self.of)
            if self.progress.stop_requested():
                raise Stopped

    def _uncurated(self, used: set[int]) -> None:
        """uncurated.jsonl: what a person needs in order to choose among the pairs without a curator's tags."""
        rows = self.intake.dpo
        with (self.draft / "uncurated.jsonl").open("wb", buffering=BLOCK) as out:
            for content, row in self.intake.uncurated_pairs():
                pair = self._pair(row)
                shown = {
                    "id": content.hex(),
                    "file": self.intake.sources[rows.file[row]].label,
                    "line": rows.line[row],
                    "used": row in used,
                    "prompt": _shown(pair.prompt[-1].content),
                    "chosen": _shown(pair.chosen[0].content),
                    "rejected": _shown(pair.rejected[0].content),
                }
                out.write(_encode(shown) + b"\n")

    def _problems(self, problems: list[Problem]) -> list[dict[str, Any]]:
        """problems.jsonl, in groups of one kind, the rejected ones first and the largest before the smaller; and the
        groups, each with its place in that file in bytes, so that a page of it is read without the rest."""
        of_reason = {reason: findings.group(reason) for reason in {problem.reason for problem in problems}}
        sizes = Counter((problem.severity, of_reason[problem.reason]) for problem in problems)
        order = {key: n for n, (key, _) in enumerate(sorted(sizes.items(), key=lambda i: (i[0][0], -i[1], i[0][1])))}
        places = array("Q", [0]) * len(problems)
        for index, problem in enumerate(problems):
            places[index] = order[problem.severity, of_reason[problem.reason]]
        groups: list[dict[str, Any]] = []
        files: set[str] = set()
        offset = 0
        with (self.draft / "problems.jsonl").open("wb", buffering=BLOCK) as out:
            for index in sorted(range(len(problems)), key=places.__getitem__):
                problem = problems[index]
                if places[index] == len(groups):
                    files = set()
                    named = {"group": of_reason[problem.reason], "severity": problem.severity, "count": 0, "files": 0}
                    groups.append(named | {"reason": problem.reason, "start": offset, "end": offset})
                if problem.file:
                    files.add(problem.file)
                line = _encode(problem) + b"\n"
                out.write(line)
                offset += len(line)
                group = groups[-1]
                group["count"] += 1
                group["files"] = len(files)
                group["end"] = offset
        return groups

    def _pairs(self, used: list[tuple[bytes, int]]) -> tuple["array[int]", dict[str, float | bool] | None]:
        rows, tokens, lengths = self.intake.dpo, array("L"), findings.Lengths()
        self.hash.update(b"dpo %d\n" % len(used))
        with (self.draft / "dpo.jsonl").open("wb", buffering=BLOCK) as out:
            for content, row in used:
                self.hash.update(content)
                self._step()
                pair = self._pair(row)
                if tag := self.intake.tags[row]:
                    pair = msgspec.structs.replace(pair, category=tag[0], type=tag[1])
                out.write(_encode(pair) + b"\n")
                lengths.add(pair.chosen[0].content, pair.rejected[0].content)
                self.refused.setdefault(hash(pair.rejected[0].content), row)
                if self.template is not None:
                    tokens.append(self.template.count_pair(pair))
                    self._warn_if_long(rows, row, tokens[-1])
        return tokens, lengths.figures()

    def _conversations(self) -> "array[int]":
        rows, tokens = self.intake.sft, array("L")
        suspects = self.intake.rows_saying(self.refused) if self.refused else set()
        self.hash.update(b"sft %d\n" % len(rows.row))
        with (self.draft / "sft.jsonl").open("wb", buffering=BLOCK) as out:
            for content, row in rows.ordered():
                self.hash.update(content)
                self._step()
                line = self.intake.line(rows, row)
                out.write(line)
                if row not in suspects and self.template is None:
                    continue
                conversation = _conversation(line)
                for reply in conversation.messages[1::2]:
                    pair = self.refused.get(hash(reply.content))
                    if pair is not None and self._pair(pair).rejected == (reply,):
                        where = self.intake.place(self.intake.dpo, pair)
                        self.intake.warn(rows, row, f"an assistant's turn equals the rejected reply of {where}")
                if self.template is not None:
                    tokens.append(self.template.count(conversation))
                    self._warn_if_long(rows, row, tokens[-1])
        return tokens

    def _pair(self, row: int) -> Preference:
        return _preference(self.intake.line(self.intake.dpo, row))

    def _warn_if_long(self, rows: Rows, row: int, tokens: int) -> None:
        if tokens > self.max_length:
            self.intake.warn(
                rows, row, f"{tokens:,} tokens; training takes up to {self.max_length:,} and leaves this one out"
            )

    def _dataset_problems(
        self,
        lengths: dict[str, float | bool] | None,
        used: list[tuple[bytes, int]],
        uncurated: bool | Collection[bytes],
    ) -> list[Problem]:
        found = []
        if not isinstance(uncurated, bool):
            absent = len(set(uncurated) - {content for content, _ in used})
            if absent:
                reason = f"{absent} of the {len(set(uncurated))} chosen uncurated pairs are not in these files"
                found.append(Problem("", None, reason, "warning"))
        if lengths is None or not lengths["biased"]:
            return found
        reason = (
            f"length bias: the chosen reply is the longer one in {lengths['chosen_longer_share']:.0%} of "
            f"{len(used)} pairs (mean {lengths['chosen_mean']:.0f} against {lengths['rejected_mean']:.0f} characters, "
            f"{lengths['ratio']:.2f} times as long); DPO may learn length instead of manner"
        )
        return [*found, Problem("", None, reason, "warning")]


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN_PAIR else text[: SHOWN_PAIR - 1] + "…"
