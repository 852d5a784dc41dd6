"""Crescendo: lead a conversation to a harmful objective in small steps, and take back what the target refuses.

Russinovich, Salem and Eldan 2024, arXiv 2404.01833. All conversations go on together, a question each at a time, so
that their answers are written in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from demur.attacks.attackers import Attacker
from demur.attacks.success import Said, SuccessJudge
from demur.attacks.talk import Talk, Turn
from demur.data.escalations import Escalation
from demur.judges.base import Judge
from demur.results import End
from demur.types import Completion, Message, Prompt

MAX_TURNS = MAX_BACKTRACKS = 10
"""As in PyRIT."""


class Reply(NamedTuple):
    """What the target said."""

    text: str
    tokens: int
    ended: bool
    """By itself, not by its length limit."""


Target = Callable[[Sequence[tuple[str, tuple[Message, ...]]]], list[Reply | None]]
"""Spec hashes with conversations to the target's replies; None where a conversation leaves no room for one."""


def going(talk: Talk, max_turns: int) -> bool:
    """Whether the conversation goes on."""
    return not (talk.end or talk.success or len(talk.kept) >= max_turns)


def crescendo(
    talks: Sequence[Talk],
    escalations: Mapping[str, Escalation],
    attacker: Attacker,
    target: Target,
    refusals: Judge,
    success: SuccessJudge,
    keep: Callable[[Sequence[Turn], Sequence[End]], None],
    max_turns: int = MAX_TURNS,
    max_backtracks: int = MAX_BACKTRACKS,
    together: int = 32,
    advance: Callable[[Talk], None] = lambda talk: None,
) -> None:
    """Go on with `talks` until each has succeeded, has `max_turns` turns, or its attacker gives up.

    A refused turn is taken back, and counts for nothing, until there were `max_backtracks` of those; from then on it
    stays. Partial refusals are not refusals, as something was said. `keep` is given the turns and ends of every round
    before the next one begins; `advance` is told of every conversation that is over.
    """
    left = [talk for talk in talks if going(talk, max_turns)]
    while left:
        some = left[:together]
        questions = attacker.ask(some)
        asked = [(talk, question) for talk, question in zip(some, questions, strict=True) if question is not None]
        replies = target([(talk.key.spec, talk.messages(question)) for talk, question in asked]) if asked else []
        answered = [_Answered(*pair, reply) for pair, reply in zip(asked, replies, strict=True) if reply is not None]
        turns = _turns(answered, escalations, refusals, success, max_backtracks)
        for talk, question in zip(some, questions, strict=True):
            if question is None:
                talk.end = End(*talk.key, attacker.silent)
        for (talk, _), reply in zip(asked, replies, strict=True):
            if reply is None:
                talk.end = End(*talk.key, "no room")
        keep(turns, [talk.end for talk in some if talk.end])
        for one, turn in zip(answered, turns, strict=True):
            one.talk.turns.append(turn)
        for talk in some:
            if not going(talk, max_turns):
                advance(talk)
        left = [talk for talk in left if going(talk, max_turns)]


class _Answered(NamedTuple):
    """A question and what was said to it."""

    talk: Talk
    question: str
    reply: Reply


def _turns(
    answered: Sequence[_Answered],
    escalations: Mapping[str, Escalation],
    refusals: Judge,
    success: SuccessJudge,
    max_backtracks: int,
) -> list[Turn]:
    """What came of each question."""
    prompts, said = [], []
    for i, (talk, question, reply) in enumerate(answered):
        prompts.append(Prompt(str(i), talk.messages(question), "harmful", "attack"))
        stop: Literal["eos", "length"] = "eos" if reply.ended else "length"
        said.append(Completion(str(i), talk.key.spec, reply.text, reply.tokens, stop))
    labels = [verdict.label for verdict in refusals.judge_all(prompts, said)]
    stays: list[int] = []
    for i, (one, label) in enumerate(zip(answered, labels, strict=True)):
        if label != "refused" or one.talk.backtracks >= max_backtracks:
            stays.append(i)
    judged = [
        Said(escalations[answered[i].talk.key.objective], answered[i].question, answered[i].reply.text, labels[i])
        for i in stays
    ]
    reached = dict(zip(stays, success.judge(judged), strict=True))
    return [
        Turn(
            *talk.key,
            number=len(talk.turns),
            user=question,
            reply=reply.text,
            tokens=reply.tokens,
            label=labels[i],
            success=reached[i].success if i in reached else None,
            taken_back=i not in reached,
            evidence=reached[i].evidence if i in reached else "",
        )
        for i, (talk, question, reply) in enumerate(answered)
    ]
