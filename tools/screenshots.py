#!/usr/bin/env python3
"""Take the pictures that README shows from a report.

usage: screenshots.py REPORT.html [--to FOLDER]     Needs Chromium; $CHROMIUM names one that is not on the path.
"""

import argparse
import sys
from pathlib import Path

import browser

SHOTS = {"report-light.png": (1240, False), "report-dark.png": (1240, True), "report-phone.png": (390, False)}
FIGURES = ("loss-curves", "stages", "load-map", "domain-share", "domain-activity", "token-frequency", "text-sample")


def take(page: browser.Page, report: Path, to: Path) -> list[Path]:
    """The top of the page in light, dark and phone width, and single figures in light and dark."""
    taken = []
    for name, (width, dark) in SHOTS.items():
        page.show(width=width, height=round(width * 0.72) if width > 600 else 844, dark=dark, scale=1.5)
        page.open(report.resolve().as_uri())
        taken.append(page.save_picture(to / name))
    for dark in (False, True):
        page.show(width=1240, dark=dark, scale=1.5)
        page.open(report.resolve().as_uri())
        shown = [key for key in FIGURES if page.evaluate(f"document.getElementById('{key}') !== null")]
        taken += [page.picture(to / f"{key}-{'dark' if dark else 'light'}.png", f"#{key}") for key in shown]
    return taken


def main() -> int:
    """Take all pictures and name them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--to", type=Path, default=Path("docs/pictures"))
    arguments = parser.parse_args()
    program = browser.find()
    if program is None:
        print("no Chromium found; install one, or name its program in $CHROMIUM", file=sys.stderr)
        return 2
    with browser.browse(program) as page:
        for path in take(page, arguments.report, arguments.to):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
