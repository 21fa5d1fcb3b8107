"""String edits: copy, reverse, repeat, … letters, after two worked examples (PCFG SET, Hupkes et al. 2020)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from subcircuit.analysis.tasks.frames import Draw, Drawer, Frame, FrameTask, Pool, Words
from subcircuit.analysis.tasks.values import About

LETTERS = tuple("BCDEFGHJKLMNOPQRSTUVWXYZ")
"""Without A and I, which are words."""
N_EXAMPLES = 2


@dataclass(frozen=True)
class Edit:
    """A function of letters: which input letter stands where in the output, and which step of it is asked for."""

    output: tuple[int, ...]
    """Index in the input of each output letter."""
    asked: int
    """Index in the output: the letters before it are shown."""
    wrong: int
    """Index in the input of the letter that a related edit would put there."""
    does: str
    second_at: int | None = None
    """Where the second operand begins, if there are two."""

    @property
    def n_inputs(self) -> int:
        return len({*self.output, self.wrong}) if self.second_at is None else 4

    def inputs(self, names: list[str]) -> str:
        if self.second_at is None:
            return " ".join(names)
        return f"{' '.join(names[: self.second_at])} , {' '.join(names[self.second_at :])}"


EDITS = {
    "copy": Edit((0, 1, 2), 0, 2, "writes the letters again (asked: the first, not the last)"),
    "reverse": Edit((2, 1, 0), 0, 0, "writes the letters backwards (asked: the first of the output, not of the input)"),
    "repeat": Edit((0, 1, 2, 0, 1, 2), 3, 2, "writes the letters twice (asked: how the second time begins)"),
    "echo": Edit((0, 1, 2, 2), 3, 0, "writes the letters and the last one again (asked: the repeated last one)"),
    "swap": Edit((3, 1, 2, 0), 1, 2, "exchanges first and last letter (asked: the second, where a reversal differs)"),
    "remove_first": Edit((2, 3), 0, 0, "drops the first of two strings (asked: the output's first letter)", 2),
    "remove_second": Edit((0, 1), 0, 2, "drops the second of two strings (asked: the output's first letter)", 2),
    "append": Edit((0, 1, 2, 3), 2, 0, "writes the second string after the first (asked: where the second begins)", 2),
    "prepend": Edit((2, 3, 0, 1), 2, 2, "writes the second string before the first (asked: where the first begins)", 2),
}


def _frame(name: str, edit: Edit) -> Frame:
    """Examples with input and whole output, then the query with its input `x` and the output `y` up to the answer."""
    lines = []
    for example in range(1, N_EXAMPLES + 1):
        given = edit.inputs([f"{{e{example}_in_{i}:letter}}" for i in range(edit.n_inputs)])
        done = " ".join(f"{{e{example}_out_{i}:letter}}" for i in range(len(edit.output)))
        lines.append(f"{name} {given} = {done}")
    shown = "".join(f"{{y_{i}:letter}} " for i in range(edit.asked))
    query = edit.inputs([f"{{x_{i}:letter}}" for i in range(edit.n_inputs)])
    return Frame("lines", "\n".join([*lines, f"{name} {query} = {shown}{{answer:letter}}"]))


def _drawer(edit: Edit) -> Drawer:
    def draw(rng: random.Random, frame: Frame, words: Words) -> Draw:
        letters = rng.sample(words["letter"], (N_EXAMPLES + 1) * edit.n_inputs + 1)
        clean: dict[str, str] = {}
        for example in range(1, N_EXAMPLES + 1):
            given = [letters.pop() for _ in range(edit.n_inputs)]
            clean |= {f"e{example}_in_{i}": letter for i, letter in enumerate(given)}
            clean |= {f"e{example}_out_{i}": given[j] for i, j in enumerate(edit.output)}
        other, *query = letters
        asked = edit.output[edit.asked]
        shown = edit.output[: edit.asked]
        clean |= {f"x_{i}": letter for i, letter in enumerate(query)}
        clean |= {f"y_{i}": query[j] for i, j in enumerate(shown)}
        changed = {f"x_{asked}": other} | {f"y_{i}": other for i, j in enumerate(shown) if j == asked}
        return Draw(clean, changed, (query[asked],), (query[edit.wrong],))

    return draw


STRING_EDIT_TASKS = {
    name: FrameTask(
        about=About(
            f"Letters are edited by a named function, with two worked examples before: {name} {edit.does}. The model "
            "has to take the rule from the examples; the wrong answer is a letter of the query that another edit "
            "would put in this place.",
            "The letter asked for is another one wherever it stands in the query, so that the answer is nowhere.",
            "Functions of PCFG SET: Hupkes et al. 2020, Compositionality Decomposed, arXiv 1908.08351",
        ),
        frames=(_frame(name, edit),),
        pools={"letter": Pool(LETTERS, (N_EXAMPLES + 1) * edit.n_inputs + 1, "letters")},
        draw=_drawer(edit),
    )
    for name, edit in EDITS.items()
}
