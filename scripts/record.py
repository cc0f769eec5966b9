#!/usr/bin/env python3
"""Records `sailover demo` on a terminal of its own and writes it as a moving picture: docs/demo.svg.

    scripts/record.py [BINARY]
"""
import html
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BINARY = sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, "target/release/sailover")
COLOURS = {"31": "#f0616d", "32": "#7bd88f", "33": "#fcc963", "36": "#5ad4e6"}
STEP, REST = 0.5, 8.0


def record():
    """Frames as (second, lines), and what is printed after them."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    child = subprocess.Popen([BINARY, "demo"], stdout=slave, stderr=slave, stdin=subprocess.DEVNULL)
    os.close(slave)
    begin, frames, text = time.monotonic(), [], ""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        text += part.decode()
        pieces = re.split(r"\x1b\[\?25l|\x1b\[\d+A", text)
        for piece in pieces[:-1]:
            if piece.strip():
                frames.append((time.monotonic() - begin, lines(piece)))
        text = pieces[-1]
    child.wait()
    last, _, after = text.partition("\x1b[?25h")
    frames.append((time.monotonic() - begin, lines(last)))
    if child.returncode != 0:
        sys.exit(f"the demo ended with {child.returncode}:\n{text}")
    return frames, [line.rstrip("\r") for line in after.strip("\r\n").split("\n")]


def lines(piece):
    return [line.strip("\r").replace("\x1b[K", "") for line in piece.rstrip("\r\n").split("\n")]


def row(text, y):
    """One line of the terminal as SVG text, its colours as spans."""
    out, colour = [], None
    for part in re.split(r"(\x1b\[\d+m)", text):
        if part.startswith("\x1b"):
            colour = COLOURS.get(part[2:-1])
        elif part:
            fill = f' fill="{colour}"' if colour else ""
            out.append(f"<tspan{fill}>{html.escape(part)}</tspan>")
    return f'<text x="16" y="{y}" xml:space="preserve">{"".join(out)}</text>'


def main():
    frames, after = record()
    kept, due = [], 0.0
    for at, picture in frames[:-1]:
        if at >= due:
            kept.append((at, picture))
            due = at + STEP
    length = frames[-1][0] + REST
    kept.append(frames[-1])
    height = 40 + 18 * (len(kept[-1][1]) + len(after) + 1)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{height}" font-family="ui-monospace,monospace" font-size="13" fill="#e8e6e3">',
        f'<rect width="860" height="{height}" rx="8" fill="#1d1f21"/>',
        '<text x="16" y="26" fill="#8a8f94">$ sailover demo</text>',
    ]
    for i, (at, picture) in enumerate(kept):
        last = i + 1 == len(kept)
        begin = at / length if i else 0.0
        end = 1.0 if last else kept[i + 1][0] / length
        shown = picture + ([""] + after if last else [])
        values, times = ("hidden;visible", f"0;{begin:.4f}") if last else ("visible;hidden", f"0;{end:.4f}") if i == 0 else ("hidden;visible;hidden", f"0;{begin:.4f};{end:.4f}")
        out.append(f'<g visibility="{"visible" if last else "hidden"}">'
                   f'<animate attributeName="visibility" dur="{length:.1f}s" repeatCount="indefinite" calcMode="discrete" values="{values}" keyTimes="{times}"/>')
        out += [row(line, 46 + 18 * n) for n, line in enumerate(shown) if line.strip()]
        out.append("</g>")
    with open(os.path.join(ROOT, "docs/demo.svg"), "w") as f:
        f.write("\n".join(out) + "\n</svg>\n")
    print("\n".join(after))


if __name__ == "__main__":
    main()
