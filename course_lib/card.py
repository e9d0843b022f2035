"""The adaptation card: what an adapter is, what it was measured at, and a signature that binds both to its bytes.

The card is the adapter's `README.md`, a model card as the hub reads it. It names each file of the folder with its
sha256, and is signed with Ed25519 (`card.sig` beside it). Whoever has the public key, from elsewhere than the folder,
can tell that neither the card nor an adapter file has changed by one byte since.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from course_lib import CourseError, models
from course_lib.results import write_text

CARD, SIGNATURE = "README.md", "card.sig"
ALLOWED = re.compile(r"[\w.-]+\.(safetensors|json|jinja|txt)")  # no pickles, no code
FILES = re.compile(r"(?m)^\| `([^`|\n]+)` \| `([0-9a-f]{64})` \|$")
THIRD = 1 / 3  # of the base's training compute: above it who fine-tunes is taken for a provider (Commission, July 2025)

# What a card has to say. The names are the template's; `facts` that lack one are refused, so that no card has holes.
FIELDS = {
    "name": "what the adapter is called",
    "purpose": "what it is for, and for whom",
    "not_for": "what it is not for",
    "failure": "which failure of the base made training necessary",
    "rejected": "list of what was tried or weighed before training, each with why it was not enough",
    "data": "list of the data sets: name, number of records, origin, licence, sha256 where there is one",
    "personal_data": "what was done about personal data",
    "training": "list of (setting, value)",
    "measured": "list of {name, value, low, high, n}",
    "baseline": "what the measured values are to be compared with",
    "gate": "list of what the gate said, one line a check",
    "passed": "whether the gate let it pass",
    "limits": "list of known limits",
    "serving": "how it is served",
    "rollback": "when it is taken back, and to what",
    "owner": "who answers for it",
    "role": "provider, deployer or both, under Regulation (EU) 2024/1689, and why",
    "risk": "risk class of the use under that regulation, and why",
    "transparency": "how people are told that they deal with a machine (Article 50)",
    "oversight": "who can overrule it, and how",
    "training_flops": "floating-point operations of the adaptation",
    "base_flops": "floating-point operations of the base's training, an estimate",
}

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

An adapter in PEFT's format for `{{ base }}` (sha256 of its weights: `{{ base_sha256 }}`).

**{{ "The gate let it pass." if passed else "The gate refused it: not for use." }}**

## Use

- Purpose: {{ purpose }}
- Not for: {{ not_for }}
- Owner: {{ owner }}

## Why weights were adapted

{{ failure }}
{% for line in rejected %}
- {{ line }}
{%- endfor %}

## Data
{% for line in data %}
- {{ line }}
{%- endfor %}

Personal data: {{ personal_data }}

## Training

| setting | value |
|---|---|
{% for setting, value in training -%}
| {{ setting }} | {{ value }} |
{% endfor %}
## What was measured

Values with their 95 % intervals and the number of items. {{ baseline }}

| measure | value | low | high | n |
|---|---|---|---|---|
{% for m in measured -%}
| {{ m.name }} | {{ m.value }} | {{ m.low }} | {{ m.high }} | {{ m.n }} |
{% endfor %}
## Gate
{% for line in gate %}
- {{ line }}
{%- endfor %}

## Limits
{% for line in limits %}
- {{ line }}
{%- endfor %}

## Serving and rollback

- Serving: {{ serving }}
- Rollback: {{ rollback }}

## Regulation (EU) 2024/1689 (AI Act)

- Role: {{ role }}
- Risk class: {{ risk }}
- Transparency: {{ transparency }}
- Human oversight: {{ oversight }}
- Compute: about {{ "%.1e" | format(training_flops) }} FLOP for this adaptation, about
  {{ "%.1e" | format(base_flops) }} for the base: a share of {{ "%.1e" | format(share) }},
  {{ "above" if share > third else "below" }} the third from which the Commission's guidelines of July 2025 take whoever
  modifies a general-purpose model for its provider.

These fields are a start for those who have to decide, and no legal advice.

## Files

| file | sha256 |
|---|---|
{% for file, digest in files -%}
| `{{ file }}` | `{{ digest }}` |
{% endfor %}"""


class CardError(CourseError):
    """A card that cannot be written, or one that must not be believed."""


def write(folder, facts: dict, task: str = "text-generation") -> Path:
    """Write the card of the adapter in `folder` from the facts (`FIELDS`) and its files' hashes; returns its path.

    CardError where a fact is missing or empty. An older signature is removed: it was of another card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder = Path(folder)
    if missing := [f"{name} ({FIELDS[name]})" for name in FIELDS if facts.get(name) in (None, "", [])]:
        raise CardError(
            "the card would have holes: " + "; ".join(missing) + ". Give each a value, also if it is 'none'."
        )
    if unknown := sorted(set(facts) - set(FIELDS)):
        raise CardError(f"the card has no place for {', '.join(unknown)}: its fields are {', '.join(FIELDS)}.")
    if faults := contradictions(facts):
        raise CardError("the card contradicts itself: " + "; ".join(faults) + ".")
    files = digests(folder)
    if "adapter_model.safetensors" not in files:
        raise CardError(f"{folder.name} holds no adapter_model.safetensors: there is nothing to write a card for.")
    data = ModelCardData(
        base_model=models.BASE_NAME, library_name="peft", pipeline_tag=task, license="apache-2.0", language="en"
    )
    facts = facts | {"measured": [_rounded(m) for m in facts["measured"]]}
    known = facts | {"base": models.BASE_NAME, "base_sha256": base_digest(), "files": sorted(files.items())}
    known |= {"share": facts["training_flops"] / facts["base_flops"], "third": THIRD}
    card = ModelCard.from_template(data, template_str=TEMPLATE, **known)
    (folder / SIGNATURE).unlink(missing_ok=True)
    write_text(folder / CARD, str(card).rstrip("\n") + "\n")
    return folder / CARD


def base_digest() -> str:
    """sha256 of the base's weights, as this machine has them."""
    return models.sha256(models.base_path() / "model.safetensors")


def _rounded(entry: dict) -> dict:
    values = {k: entry.get(k) for k in ("name", "value", "low", "high", "n")}
    return {k: f"{v:.4g}" if isinstance(v, float) else "" if v is None else v for k, v in values.items()}


def contradictions(facts: dict) -> list[str]:
    """What cannot be true together: an interval without its value, a share beyond 1 or between two possible counts, a
    gate that passed with a refusal in it."""
    found = []
    for m in facts["measured"]:
        name, value, low, high, n = (m.get(k) for k in ("name", "value", "low", "high", "n"))
        if low is not None and not low <= value <= high:
            found.append(f"{name} is {value}, outside of its interval {low} to {high}")
        if m.get("share"):
            if not 0 <= value <= 1:
                found.append(f"{name} is a share of {value}")
            elif n and abs(value * n - round(value * n)) > 0.01:
                found.append(f"{name} is {value}, which no count out of {n} gives")
    refused = [line for line in facts["gate"] if line.startswith("REFUSED")]
    if facts["passed"] and refused:
        found.append(f"it says that the gate passed, and lists a refusal ({refused[0]})")
    return found


def digests(folder) -> dict[str, str]:
    """{file: sha256} of everything in the folder but card and signature. CardError for folders, links and files of
    other kinds than an adapter needs."""
    found = {}
    for path in sorted(Path(folder).iterdir()):
        if path.name in (CARD, SIGNATURE):
            continue
        if path.is_symlink() or not path.is_file() or not ALLOWED.fullmatch(path.name):
            raise CardError(
                f"{path.name} does not belong into an adapter's folder: plain safetensors and JSON alone do."
            )
        found[path.name] = models.sha256(path)
    return found


# --- signature -------------------------------------------------------------------------------------------------------


def new_key():
    """A fresh Ed25519 private key. It lives in memory: whoever can read it can sign in its owner's name."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate()


def public_text(key) -> str:
    """The public half as 44 characters, to be handed out by another way than the card."""
    return base64.b64encode(key.public_key().public_bytes_raw()).decode()


def sign(folder, key) -> Path:
    """Sign the card of a folder; returns the signature's path. The key is one of `new_key`."""
    text = _read(Path(folder) / CARD)
    about = {"algorithm": "Ed25519", "file": CARD, "signature": base64.b64encode(key.sign(text)).decode()}
    write_text(Path(folder) / SIGNATURE, json.dumps(about, indent=1) + "\n")
    return Path(folder) / SIGNATURE


def verify(folder, public: str) -> dict[str, str]:
    """{file: sha256} of an adapter whose card carries a valid signature of `public` and whose files are what it says.

    CardError otherwise, with the reason. The key must come from elsewhere: a folder that brings its own proves nothing.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    folder = Path(folder)
    text = _read(folder / CARD)
    try:
        about = json.loads(_read(folder / SIGNATURE))
        if set(about) != {"algorithm", "file", "signature"} or (about["algorithm"], about["file"]) != ("Ed25519", CARD):
            raise ValueError("not what `sign` writes")
        signature = base64.b64decode(about["signature"], validate=True)
        if base64.b64encode(signature).decode() != about["signature"]:
            raise ValueError("spare bits are set")  # more than one spelling would mean the same signature
    except (ValueError, TypeError) as error:
        raise CardError(f"{SIGNATURE} is no signature ({error}): do not load this adapter.") from None
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public, validate=True))
    except ValueError as error:
        raise CardError(f"the public key {public[:8]!r}... is none ({error}): 44 characters of base64 are.") from None
    try:
        key.verify(signature, text)
    except InvalidSignature:
        raise CardError(
            "the card is not what was signed, or was signed with another key: do not load this adapter."
        ) from None
    named = dict(FILES.findall(text.decode("utf-8")))
    there = digests(folder)
    if extra := sorted(set(there) - set(named)):
        raise CardError(f"{', '.join(extra)} lies beside the adapter, and the card does not name it: do not load it.")
    for name, digest in named.items():
        if name not in there:
            raise CardError(f"{name} is on the card and not in the folder.")
        if there[name] != digest:
            raise CardError(f"{name} is not the file that was signed: do not load this adapter.")
    if not named:
        raise CardError("the card names no file: it vouches for nothing.")
    return named


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CardError(
            f"{path.name} cannot be read ({error.strerror}): an adapter without it is not loaded."
        ) from None


def flops(parameters: int, tokens: int) -> float:
    """Floating-point operations of a training run, about: six for each parameter and token (Kaplan et al. 2020). For an
    adapter it is an upper bound: the frozen weights need no gradient of their own."""
    return 6.0 * parameters * tokens
