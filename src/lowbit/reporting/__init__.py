"""What many runs cost, on one page: ``lowbit report``; and what to take, by what was measured: ``lowbit recommend``."""

from lowbit.reporting.page import Page, make_page, write_report
from lowbit.reporting.sources import SourceError, Sources, read_sources

__all__ = ["Page", "SourceError", "Sources", "make_page", "read_sources", "write_report"]
