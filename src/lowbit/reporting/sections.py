"""What a page is made of."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.reporting.figures import Picture
from lowbit.reporting.sources import Sample
from lowbit.tables import Table


@dataclass(frozen=True)
class Entry:
    """How one result was made.

    Attributes:
        label: what the result is called.
        link: its id on the page, to which tables link.
        facts: names and values: hashes, versions, the machine.
        recipe: YAML for ``--recipe``; empty where there is none.
        commands: to repeat it, with that file as ``recipe.yaml``.
    """

    label: str
    link: str
    facts: tuple[tuple[str, str], ...]
    recipe: str = ""
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A heading with what belongs to it; ``words`` are paragraphs."""

    title: str
    words: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    entries: tuple[Entry, ...] = ()
    samples: tuple[Sample, ...] = ()
