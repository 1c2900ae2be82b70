"""Writes a report's files. Owns `report.json` and `report.html` in its folder, nothing else there."""

from pathlib import Path

from nahtlos.runtime.evidence.html import render_html
from nahtlos.runtime.evidence.report import REPORT_NAME, encode, write_whole
from nahtlos.runtime.evidence.report_contents import Report

PAGE_NAME = "report.html"


def publish(folder: Path, report: Report) -> None:
    """`report.json` first: the page is never ahead of the figures it shows."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / REPORT_NAME, encode(report))
    write_whole(folder / PAGE_NAME, render_html(report).encode())
