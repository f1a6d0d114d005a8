"""Built-in prompts: short and long, prose, dialogue, code, tables, several scripts."""

from __future__ import annotations

from typing import Final

# Number of tokens that are generated after each prompt.
GENERATED: Final = 16
# Number of cases that `loradeploy.compare` generates.
CASES: Final = 6
# Number of held-out examples for the task metrics.
EXAMPLES: Final = 100

PROMPTS: Final[tuple[str, ...]] = (
    "The capital of France is",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    (
        "Shares fell in early trading on Thursday after the central bank said that it would keep"
        " rates where they are until the summer. Analysts had expected a cut, and the currency"
    ),
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist",
    "Q: A train leaves at 09:40 and arrives at 13:05. How long is the journey?\nA:",
    '{"name": "Ada", "languages": ["en", "fr"], "age":',
    "日本の首都は",
    (
        "Once upon a time, in a village at the edge of a great forest, there lived a clockmaker who"
        " could not sleep. Every night he heard"
    ),
    "SELECT country, COUNT(*) FROM customers WHERE",
    "Hi",
    (
        "The striker scored twice in the second half as the home side came back from two goals"
        " down, and the manager said afterwards that"
    ),
    "| year | sales |\n|------|-------|\n| 2021 | 1,204 |\n| 2022 |",
    "Привет! Как дела? 🙂 Сегодня мы",
    "To make a loaf of bread you need flour, water, salt and yeast. First,",
    "e^{i\\pi} + 1 = 0 is known as",
    (
        "User: My parcel has not arrived.\nAgent: What is your order number?\n"
        "User: It is 48-1130.\nAgent:"
    ),
)
