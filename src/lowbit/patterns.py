"""Patterns of layer names that a file gives: compiled, and bounded in what they can cost.

Python's regular expressions backtrack: ``([a-z]+)+!`` takes longer than anyone waits on a name of 40 letters, and nothing
can interrupt it. So the tries that a pattern allows are counted before it is used.
"""

from __future__ import annotations

import re
from typing import Any

_LONGEST = 500
"""Characters of a pattern."""
_NAME = 64
"""Characters of a name, for the count of tries."""
_MOST_TRIES = (_NAME + 1) ** 4
"""Three free repeats after a free start: some tenths of a second at worst."""
_MOST_REPEATS = 1000

_PREFIX = "re:"


def check_pattern(match: str) -> None:
    """Checks a role, a name pattern, or ``re:`` and a regular expression.

    Raises:
        ValueError: it is too long, is no regular expression, or could backtrack for ever.
    """
    if not isinstance(match, str):
        raise ValueError(f"a pattern of layers is text, found {match!r:.100}")
    if len(match) > _LONGEST:
        raise ValueError(f"the pattern {match[:40]!r}... has {len(match)} characters, at most {_LONGEST} are read")
    if not match.startswith(_PREFIX):
        return
    try:
        re.compile(match[len(_PREFIX) :])
        tries = _NAME * _tries(re._parser.parse(match[len(_PREFIX) :]))  # pyright: ignore[reportAttributeAccessIssue]
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{match!r:.100} is not a regular expression: {error}") from error
    if tries > _MOST_TRIES:
        raise ValueError(
            f"the regular expression {match!r:.100} could try for ever: it repeats what repeats, or has more than three free "
            "repeats; write it without nested + and *"
        )


def _tries(parsed: Any) -> float:
    """How many ways there are, at most, to match a prefix of a name with a parsed pattern."""
    tries = 1.0
    for code, argument in parsed:
        match str(code):
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                least, most, inner = argument
                if (least if most == re._parser.MAXREPEAT else most) > _MOST_REPEATS:  # pyright: ignore[reportAttributeAccessIssue]
                    return float("inf")
                most = min(int(most), _NAME)
                each = _tries(inner)
                tries *= (most - min(int(least), most) + 1) * min(each, 1e4) ** most
            case "BRANCH":
                tries *= sum(_tries(each) for each in argument[1])
            case "SUBPATTERN":
                tries *= _tries(argument[-1])
            case "ATOMIC_GROUP":
                tries *= _tries(argument)
            case "ASSERT" | "ASSERT_NOT":
                tries *= _tries(argument[1])
            case "GROUPREF_EXISTS":
                tries *= sum(_tries(each) for each in argument[1:] if each is not None)
    return min(tries, 1e30)
