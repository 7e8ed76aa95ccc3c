"""One HTML file to look at results and listen to them: it opens from disk and needs no network."""

from lalm_lens.report.page import write_report

__all__ = ["write_report"]
