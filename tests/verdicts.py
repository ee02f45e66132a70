"""Verdicts as people give them, through the same door: a talk is saved, its answers are judged and recorded."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from katherine import reviews, runs, talks
from katherine.reviews import Mark, Recommendation, Verdict
from katherine.settings import Home
from katherine.talks import Answer, Round, Sampling


@dataclass(frozen=True)
class Panel:
    """A home with an export, of which people talk to these quants."""

    home: Home
    export: str
    quants: tuple[str, ...] = ("q4_k_m", "q5_k_m", "q6_k")

    def column(self, quant: str) -> str:
        return f"{self.export}:{quant}"

    def talk(
        self,
        who: str,
        rounds: Sequence[tuple[str, Mapping[str, str]]],
        *,
        order: Sequence[str] = (),
        source: str = "",
        system: str = "",
        cut: Sequence[str] = (),
    ) -> talks.Talk:
        """A finished talk. rounds: (question, quant → answer). order: of the quants, as they were shown. cut: whose
        answers did not come to an end."""
        files = {self.column(quant): quant[:2] * 32 for quant in order or self.quants}
        made = talks.create(
            self.home, who=who, role="reviewer", files=files, sampling=Sampling(), system=system, source=source,
            export=self.export,
        )  # fmt: skip
        answered = tuple(
            Round(question, Sampling(), tuple(self._answer(quant, said[quant], cut) for quant in order or self.quants))
            for question, said in rounds
        )
        made = talks.Talk(**{name: getattr(made, name) for name in made.__struct_fields__} | {"rounds": answered})
        talks.save(self.home, made)
        return made

    def _answer(self, quant: str, text: str, cut: Sequence[str]) -> Answer:
        return Answer(self.column(quant), "done", text, finish="length" if quant in cut else "end")

    def judge(
        self,
        who: str,
        question: str,
        said: Mapping[str, str],
        *,
        best: str = "",
        tie: bool = False,
        none_good: bool = False,
        order: Sequence[str] = (),
        source: str = "",
        system: str = "",
        cut: Sequence[str] = (),
        **marks: Mark,
    ) -> Verdict:
        """One question of its own, judged at once. marks: quant → what is said of its answer."""
        talk = self.talk(who, [(question, said)], order=order, source=source, system=system, cut=cut)
        return self.judge_round(talk, 0, who, best=best, tie=tie, none_good=none_good, **marks)

    def judge_round(
        self,
        talk: talks.Talk,
        number: int,
        who: str,
        *,
        best: str = "",
        tie: bool = False,
        none_good: bool = False,
        **marks: Mark,
    ) -> Verdict:
        return reviews.judge(
            self.home, talk, round=number, reviewer=who, role="reviewer", tie=tie, none_good=none_good,
            marks={self.column(quant): mark for quant, mark in marks.items()},
            preferred=self.column(best) if best else "",
        )  # fmt: skip

    def recommend(self, who: str, good: bool, quant: str = "", note: str = "") -> Recommendation:
        said = Recommendation(
            secrets.token_hex(8), runs.now(), who, "reviewer", self.export, good,
            self.column(quant) if quant else "", note, len(self.verdicts()),
        )  # fmt: skip
        reviews.recommend(self.home, said)
        return said

    def verdicts(self) -> list[Verdict]:
        return reviews.verdicts(self.home, self.export)


def asked(home: Home, dataset: str | None = None) -> Panel:
    """An export without files: what is judged are its words."""
    run = runs.create(home, "export", recipe={}, who="test", dataset=dataset)
    run.set_status(state=runs.State.succeeded)
    return Panel(home, run.id)


LIKED, DISLIKED = Mark(thumb=1), Mark(thumb=-1)
