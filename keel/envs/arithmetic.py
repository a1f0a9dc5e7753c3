"""The quickstart's world: arithmetic of reasoning-gym with a calculator, and demonstrations of its use.

The agent reads a question, may call the calculator as often as it likes, and gives a final answer, which the scorer
of reasoning-gym judges. The demonstrations mix two habits, answering at once with a guess and calling the calculator,
so that reinforcement has something to choose between.
"""

from __future__ import annotations

import ast
import json
import operator
import random
import re
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

from keel.envs.base import Demonstration, EnvError, Split
from keel.envs.reasoning_gym import first_messages, reasoning_gym_tasks
from keel.envs.tool_env import OnMalformed, ToolEnv
from keel.envs.tools import tool
from keel.types import Message, Task

MAX_EXPRESSION_CHARS = 200
MAX_MAGNITUDE = 10**30
MAX_EXPONENT = 100

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")


def calculator(expression: str) -> str:
    """Compute."""
    return evaluate(expression)


def evaluate(expression: str) -> str:
    """The value of an arithmetic expression of numbers, + - * / // % ** and parentheses, as text.

    Raises ValueError, in words meant for the agent, for anything else, for division by zero, and for expressions or
    values that are too large. Nothing is ever executed: the expression's syntax tree is walked.
    """
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise ValueError(f"the expression is longer than {MAX_EXPRESSION_CHARS} characters")
    try:
        tree = ast.parse(_LEADING_ZEROS.sub("", expression.strip()), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError("not an arithmetic expression") from None
    try:
        value = _value(tree.body)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _bounded(_UNARY[type(node.op)](_value(node.operand)))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > MAX_EXPONENT:
            raise ValueError(f"an exponent is larger than {MAX_EXPONENT}")
        return _bounded(_BINARY[type(node.op)](left, right))
    raise ValueError("only numbers, + - * / // % ** and parentheses can be computed")


def _bounded(value: Any) -> int | float:
    if isinstance(value, complex):
        raise ValueError("the result is not a real number")
    if not abs(value) <= MAX_MAGNITUDE:  # catches not-a-number as well
        raise ValueError("a number is too large")
    return value  # type: ignore[no-any-return]


class CalculatorEnv(ToolEnv):
    """Sums and products with a calculator.

    Tasks: `num_tasks` questions are generated per data set before equal ones are merged; `eval_share` of them is held
    out. `min_terms` to `max_digits` shape the sums, `product_min_digits` and `product_max_digits` the products of two
    numbers; a task name left out of `tasks_of` is not used.

    Demonstrations: `guess_share` of them answer at once with a guess (a random digit), the others
    call the calculator and report what it says.
    """

    def __init__(  # noqa: PLR0913 (a knob each, and all of them by name)
        self,
        *,
        tasks_of: Sequence[str] = ("chain_sum", "products"),
        num_tasks: int = 6000,
        min_terms: int = 2,
        max_terms: int = 3,
        min_digits: int = 1,
        max_digits: int = 3,
        product_min_digits: int = 1,
        product_max_digits: int = 2,
        eval_share: float = 0.2,
        seed: int = 0,
        guess_share: float = 0.4,
        instructions: str = "",
        on_malformed: OnMalformed = "end",
    ) -> None:
        super().__init__(tools=(_CALCULATOR,), on_malformed=on_malformed)
        shapes = {
            "chain_sum": {
                "min_terms": min_terms,
                "max_terms": max_terms,
                "min_digits": min_digits,
                "max_digits": max_digits,
            },
            "products": {"min_digits": product_min_digits, "max_digits": product_max_digits},
        }
        unknown = [name for name in tasks_of if name not in shapes]
        if unknown or not tasks_of:
            raise ValueError(f"tasks_of names some of {list(shapes)}; got {list(tasks_of)}")
        if not 0.0 <= guess_share <= 1.0:
            raise ValueError(f"guess_share is a share between 0 and 1; got {guess_share}")
        datasets = {name: shapes[name] for name in tasks_of}
        self._source = reasoning_gym_tasks(datasets, size=num_tasks, seed=seed, eval_share=eval_share)
        self._guess_share = guess_share
        self._instructions = instructions
        self._task: Task | None = None

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._source.tasks(split)

    async def reset(self, task: Task) -> Sequence[Message]:  # async, as step is: microseconds, not worth a thread
        self._task = task
        return first_messages(self._instructions, str(self._source.entry(task)["question"]))

    def score(self, answer: str) -> float:
        if self._task is None:
            raise EnvError("step() before reset()")
        return self._source.score(self._task, answer)

    def demonstrations(self, count: int, *, seed: int, start: int) -> Sequence[Demonstration]:
        """Demonstrations number `start` to `start + count - 1`, at tasks of the train split drawn with replacement."""
        tasks = self._source.tasks("train")
        return [self._demonstrate(tasks, _random("demonstration", seed, start + i)) for i in range(count)]

    def _demonstrate(self, tasks: Sequence[Task], draw: random.Random) -> Demonstration:
        task = tasks[draw.randrange(len(tasks))]
        if draw.random() < self._guess_share:
            return Demonstration(task, ((_final(_guess(draw)),),))
        expression = str(self._source.entry(task)["metadata"]["expression"])
        return Demonstration(task, ((_call(expression),), (_final(evaluate(expression)),)))


_CALCULATOR = tool(calculator, quick=True)


def _call(expression: str) -> Message:
    content = json.dumps({"expression": expression})
    return Message("assistant", content, channel="commentary", recipient="functions.calculator", content_type="json")


def _final(answer: str) -> Message:
    return Message("assistant", answer, channel="final")


def _guess(draw: random.Random) -> str:
    """A digit, hastily: the fewer digits nobody can foresee, the less noise in what the demonstrations teach."""
    return str(draw.randrange(10))


def _random(purpose: str, seed: int, number: int) -> random.Random:
    digest = blake2b(f"{purpose}/{seed}/{number}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))
