"""What a run leaves behind: results.json for machines, README.md with a table, and a chart (SVG)."""
import datetime
import json
import os
import platform
import subprocess

NAMES = ["sailover", "nginx", "haproxy"]
COLOURS = {"sailover": "#1f6f8b", "nginx": "#9aa5ad", "haproxy": "#c8ced3"}
WORKS = {
    "keepalive-64": ("requests on 64 kept connections", "µs CPU each"),
    "keepalive-512": ("requests on 512 kept connections", "µs CPU each"),
    "close-64": ("one request per connection, 64 at once", "µs CPU each"),
    "bulk-1": ("one download at a time", "ms CPU per GB"),
    "bulk-64": ("64 downloads at once", "ms CPU per GB"),
    "bulk-600": ("600 downloads at once", "ms CPU per GB"),
    "idle-4000": ("4,000 idle connections", "bytes of memory each"),
}


def first_line(*argv):
    done = subprocess.run(argv, capture_output=True, text=True)
    return (done.stdout + done.stderr).splitlines()[0].strip()


def machine(binary):
    with open("/proc/cpuinfo") as f:
        model = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), platform.machine())
    with open("/proc/meminfo") as f:
        memory = int(f.readline().split()[1]) / 1024 ** 2
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB, Linux {platform.release().split('-')[0]}",
        "versions": {"sailover": first_line(binary, "--version"), "nginx": first_line("nginx", "-v").replace("nginx version: ", ""),
                     "haproxy": first_line("haproxy", "-v").split(" 20")[0]},
    }


def figure(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def markdown(facts, results, rounds):
    lines = [
        f"# Side by side, {facts['date']}", "",
        f"{facts['machine']}. {facts['versions']['sailover']}; {facts['versions']['nginx']}; {facts['versions']['haproxy']}.", "",
        f"Medians of {rounds} interleaved rounds, least and most in brackets. The ratio is sailover's figure to that of the peer with",
        "the better median, round by round: median and 95 % interval (order statistics; six rounds or more). Below 1 sailover needs",
        "less. Two workers or threads each; access log, time-outs and keepalive towards backends are on in all three, active checks",
        "in the two that have them. Memory is all private memory of all processes, divided; the kernel's own is not in it.", "",
        "| work | figure | sailover | nginx stream | HAProxy | ratio to the better |",
        "|---|---|---|---|---|---|",
    ]
    for work, r in results.items():
        title, unit = WORKS[work]
        cells = [f"{figure(r['median'][n])} ({figure(min(r['rounds'][n]))}-{figure(max(r['rounds'][n]))})" for n in NAMES]
        middle, low, high = r["ratio"]
        lines.append(f"| {title} | {unit} | " + " | ".join(cells) + f" | **{middle:.2f}** [{low:.2f}, {high:.2f}] |")
    return "\n".join(lines) + "\n\n![ratios](chart.svg)\n"


def svg(facts, results):
    row, left, scale, most = 46, 290, 330, 1.28
    height = 80 + row * len(results)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="820" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="820" height="{height}" fill="white"/>',
        '<text x="20" y="24" font-size="15" font-weight="bold">What the same work costs, the better peer = 1 (less is better)</text>',
        f'<text x="20" y="42" fill="#666">{facts["date"]}; {facts["machine"]}</text>',
    ]
    y = 62
    for work, r in results.items():
        better = min(r["median"]["nginx"], r["median"]["haproxy"])
        out.append(f'<text x="{left - 10}" y="{y + 20}" text-anchor="end">{WORKS[work][0]}</text>')
        for i, name in enumerate(NAMES):
            value = r["ratio"][0] if name == "sailover" else r["median"][name] / better
            width = min(value, most) * scale
            out.append(f'<rect x="{left}" y="{y + 12 * i}" width="{width:.1f}" height="10" fill="{COLOURS[name]}"/>')
            # The label stands behind the bar and behind the interval on it.
            end = max(width, min(r["ratio"][2], most) * scale) if name == "sailover" else width
            out.append(f'<text x="{left + end + 6:.1f}" y="{y + 12 * i + 9}" font-size="10" fill="#444">{name} {value:.2f}</text>')
        _, low, high = r["ratio"]
        a, b = left + min(low, most) * scale, left + min(high, most) * scale
        out.append(f'<path d="M{a:.1f} {y + 5}H{b:.1f}M{a:.1f} {y + 2}v6M{b:.1f} {y + 2}v6" stroke="#0b2f3c"/>')
        y += row
    out.append(f'<path d="M{left + scale} 56V{height - 14}" stroke="#888" stroke-dasharray="3 3"/>')
    return "\n".join(out) + "\n</svg>\n"


def write(directory, binary, results, rounds):
    os.makedirs(directory, exist_ok=True)
    facts = machine(binary)
    with open(os.path.join(directory, "results.json"), "w") as f:
        json.dump({**facts, "rounds": rounds, "results": results}, f, indent=1)
        f.write("\n")
    with open(os.path.join(directory, "README.md"), "w") as f:
        f.write(markdown(facts, results, rounds))
    with open(os.path.join(directory, "chart.svg"), "w") as f:
        f.write(svg(facts, results))
