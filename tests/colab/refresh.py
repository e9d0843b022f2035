"""Write freeze.txt anew: what Colab's GPU runtime has, as Google publishes it. Prints what moved, as a table.

python tests/colab/refresh.py [FILE ...]    FILE: a pip freeze (and an os-info) to take instead of the network's
"""

import re
import sys
import urllib.request
from datetime import date
from pathlib import Path

FREEZE = Path(__file__).parent / "freeze.txt"
SOURCE = "https://raw.githubusercontent.com/googlecolab/backend-info/main/"


def versions(text):
    """{name: version} of a pip freeze; an entry with an address counts where its file's name tells the version."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition("#")[0].partition("@")
        if match := re.match(r"([\w.-]+)==(\S+)", line):
            found[match[1]] = match[2]
        elif rest and (match := re.search(r"/[\w.]+?-(\d[\w.+!]*?)(?:-[^/]*\.whl|\.tar\.gz)\s*$", rest)):
            found[name.strip()] = match[1]
    return found


def main(files):
    if files:
        text = "".join(Path(name).read_text(encoding="utf-8") for name in files)
    else:
        text = ""
        for name in ("pip-freeze.gpu.txt", "os-info-gpu.txt"):
            with urllib.request.urlopen(SOURCE + name, timeout=60) as answer:
                text += answer.read().decode()
    old, new = versions(FREEZE.read_text(encoding="utf-8")), versions(text)
    if len(new) < 100:
        sys.exit(f"error: only {len(new)} packages were read, so {FREEZE.name} stays as it is: has the format changed?")
    python = re.search(r"(?m)^Python (\S+)", text)
    head = (
        f"# Packages of Colab's GPU runtime (Python {python[1] if python else '?'}), as published on {date.today()}:\n"
    )
    head += "# googlecolab/backend-info, pip-freeze.gpu.txt. Written by refresh.py.\n"
    FREEZE.write_text(head + "".join(f"{name}=={version}\n" for name, version in new.items()), encoding="utf-8")
    print("| package | stored | Colab |\n|---|---|---|")
    for name in sorted(old | new):
        if old.get(name) != new.get(name):
            print(f"| {name} | {old.get(name, '')} | {new.get(name, '')} |")


if __name__ == "__main__":
    main(sys.argv[1:])
