"""A registry of adapters: what each was trained on, who may use it, and which one answers for whom.

One JSON file, written whole or not at all. An entry holds sha256 hashes of base, tokenizer and the adapter's files, so
that a changed byte is found when the adapter is loaded. Whatever does not fit is refused with a `RegistryError` that
names the value and the cure.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from course_lib import CourseError, models, results

BASE = "__base__"  # PEFT's name for a row of a mixed batch that takes no adapter
ID = re.compile(
    r"(?P<base>[a-z0-9]+(?:-[a-z0-9]+)*)\.(?P<task>[a-z0-9]+(?:-[a-z0-9]+)*)\.v(?P<version>[1-9][0-9]{0,3})"
)
TENANT = re.compile(r"[a-z][a-z0-9-]{0,30}")
FILES = ("adapter_config.json", "adapter_model.safetensors")
MERGING = ("never", "plain", "ties", "dare")
UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".py")


class RegistryError(CourseError):
    """The registry refuses. The message says which value it is about, and what to do."""


def file_hashes(folder: str | Path, names=FILES) -> dict[str, str]:
    """{file name: sha256} of an adapter's files."""
    folder = Path(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise RegistryError(f"{folder.name} lacks {', '.join(missing)}: save it with PEFT's save_pretrained.")
    return {name: models.sha256(folder / name) for name in names}


def base_hash(folder: str | Path) -> str:
    """One sha256 over the weights and the configuration of a base model's folder, file by file in order of name."""
    folder = Path(folder)
    names = sorted(path.name for path in folder.glob("*.safetensors")) + ["config.json"]
    if len(names) == 1 or not (folder / "config.json").is_file():
        raise RegistryError(f"{folder.name} is no base model: it needs config.json and *.safetensors.")
    return _digest(file_hashes(folder, names))


def tokenizer_hash(tokenizer) -> str:
    """sha256 of what a tokenizer does: its vocabulary, its special tokens and its chat template. A file's layout and
    the version that wrote it do not count."""
    parts = {
        "vocabulary": tokenizer.get_vocab(),
        "special": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "template": tokenizer.chat_template,
    }
    return _digest(parts)


def _digest(parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def inspect(folder: str | Path) -> dict:
    """What the registry keeps of an adapter's configuration, compared with the weights themselves.

    Raises RegistryError for what one shared base cannot serve: other methods than plain LoRA, whole layers saved
    beside it, ranks that the configuration does not tell, numbers that are not finite, files that could hold code.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    if unsafe := sorted(path.name for path in folder.glob("*") if path.suffix in UNSAFE):
        raise RegistryError(f"{folder.name} holds {unsafe[0]}, which could run code when read: keep safetensors alone.")
    file_hashes(folder)
    try:
        config = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RegistryError(f"{FILES[0]} of {folder.name} is not JSON ({error}): save the adapter again.") from None
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        method = "DORA" if config.get("use_dora") else config.get("peft_type")
        raise RegistryError(f"method {method} of {folder.name} cannot share a batch: merge it, or train plain LoRA.")
    if config.get("modules_to_save"):
        raise RegistryError(
            f"{folder.name} replaces whole layers ({', '.join(config['modules_to_save'])}): a shared base has one copy "
            "of each. Train without modules_to_save, or serve it alone."
        )
    rank, ranks = config.get("r"), set()
    try:
        with safe_open(folder / FILES[1], framework="pt") as tensors:
            names = list(tensors.keys())
            if strange := [name for name in names if ".lora_A." not in name and ".lora_B." not in name]:
                raise RegistryError(
                    f"{folder.name} holds {strange[0]}, which is no LoRA matrix: save the adapter alone."
                )
            for name in names:
                tensor = tensors.get_tensor(name)
                if not torch.isfinite(tensor).all():
                    raise RegistryError(f"{name} of {folder.name} holds numbers that are not finite: train it again.")
                ranks.add(tensor.shape[0] if ".lora_A." in name else tensor.shape[1])
    except SafetensorError as error:
        raise RegistryError(f"{FILES[1]} of {folder.name} cannot be read ({error}): save the adapter again.") from None
    if ranks != {rank}:
        found = ", ".join(map(str, sorted(ranks))) or "none"
        raise RegistryError(f"{folder.name} says rank {rank}, its matrices have {found}: copy both files together.")
    modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names})
    return {"method": "lora", "rank": rank, "alpha": config.get("lora_alpha"), "modules": modules}


class Registry:
    """The registry in one JSON file, for one base and one tokenizer.

    path: the file; made at the first registration. base, tokenizer: sha256 of `base_hash` and `tokenizer_hash` of what
    the server runs. max_rank: the rank that the server has made room for.
    """

    def __init__(self, path: str | Path, *, base: str, tokenizer: str, max_rank: int = 16):
        self.path, self.base, self.tokenizer, self.max_rank = Path(path), base, tokenizer, max_rank
        self.read()

    # --- the file

    def read(self) -> dict:
        """{"adapters": {id: entry}, "routes": {tenant: {"active", "canary", "share"}}}"""
        if not self.path.exists():
            return {"adapters": {}, "routes": {}}
        try:
            state = json.loads(self.path.read_text(encoding="utf-8"))
            if not (isinstance(state["adapters"], dict) and isinstance(state["routes"], dict)):
                raise TypeError("adapters and routes must be tables")
            return state
        except (ValueError, KeyError, TypeError) as error:
            raise RegistryError(
                f"{self.path.name} is no registry ({error}): put back the last good copy, and do not edit it by hand."
            ) from None

    @contextmanager
    def _change(self):
        """Read, change, write, while nobody else does: a lock beside the file, and the file replaced as a whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock", timeout=10):
            state = self.read()
            yield state
            results.write_json(self.path, state)

    # --- entries

    def register(
        self,
        id: str,
        folder: str | Path,
        *,
        tenant: str,
        objective: str,
        system: str,
        base: str,
        tokenizer: str,
        merging: str = "never",
        stacks_with: tuple[str, ...] = (),
        rollback: str = BASE,
    ) -> dict:
        """Take an adapter in, and return its entry.

        id: `base.task.v1`; tenant: the one owner; objective: what it was trained for; system: the system prompt that
        it was trained with; base, tokenizer: hashes of what
        it was trained on; merging: one of `MERGING`; stacks_with: objectives that it may be active with at the same
        time; rollback: where to go back to, an adapter of the same tenant or `__base__`.
        """
        if not ID.fullmatch(id):
            raise RegistryError(
                f"id {id!r} is not of the form base.task.v1 (small letters, digits, dashes): rename it."
            )
        if not TENANT.fullmatch(tenant):
            raise RegistryError(f"tenant {tenant!r}: use small letters, digits and dashes, a letter first.")
        if merging not in MERGING:
            raise RegistryError(f"merge policy {merging!r}: choose one of {', '.join(MERGING)}.")
        if not objective.strip():
            raise RegistryError(f"{id} says no objective: name what it was trained for, such as sft.")
        if base != self.base:
            raise RegistryError(
                f"{id} was trained on base {base[:12]}, this server runs {self.base[:12]}: train it again on this base."
            )
        if tokenizer != self.tokenizer:
            raise RegistryError(
                f"{id} was trained with tokenizer {tokenizer[:12]}, this server has {self.tokenizer[:12]}: its special "
                "tokens or its template differ. Serve it with its own, or train it again."
            )
        entry = inspect(folder)
        if entry["rank"] > self.max_rank:
            raise RegistryError(
                f"{id} has rank {entry['rank']}, the server has room for {self.max_rank}: raise max_rank."
            )
        entry |= {
            "tenant": tenant,
            "objective": objective,
            "system": system,
            "base": base,
            "tokenizer": tokenizer,
            "merging": merging,
            "stacks_with": sorted(stacks_with),
            "rollback": rollback,
            "folder": str(Path(folder).absolute()),
            "files": file_hashes(folder),
        }
        with self._change() as state:
            if id in state["adapters"]:
                raise RegistryError(f"{id} is registered already, and an entry never changes: raise the version.")
            space = id.rsplit(".", 1)[0]
            if any(e["tenant"] != tenant for known, e in state["adapters"].items() if known.rsplit(".", 1)[0] == space):
                raise RegistryError(f"{space} is a name of another tenant: choose another task name for {tenant}.")
            self._check_rollback(state, id, tenant, rollback)
            state["adapters"][id] = entry
            state["routes"].setdefault(tenant, {"active": BASE, "canary": None, "share": 0.0})
        return entry

    @staticmethod
    def _check_rollback(state: dict, id: str, tenant: str, rollback: str) -> None:
        if rollback == BASE:
            return
        target = state["adapters"].get(rollback)
        if target is None:
            raise RegistryError(
                f"{id} would roll back to {rollback}, which is not registered: register that one first."
            )
        if target["tenant"] != tenant:
            raise RegistryError(
                f"{id} would roll back to {rollback} of another tenant: name one of {tenant}'s, or {BASE}."
            )

    def entry(self, id: str, tenant: str | None = None) -> dict:
        """The entry of an adapter. For a tenant, adapters of others do not exist: the same words refuse both."""
        found = self.read()["adapters"].get(id)
        if found is None or tenant not in (None, found["tenant"]):
            whom = f" for tenant {tenant}" if tenant else ""
            raise RegistryError(f"no adapter {id!r}{whom}: register it, or name one that is.")
        return found

    def verify(self, id: str) -> Path:
        """The folder of an adapter whose files are, to the last byte, those that were registered."""
        entry = self.entry(id)
        if (entry["base"], entry["tokenizer"]) != (self.base, self.tokenizer):
            raise RegistryError(f"{id} is of another base or tokenizer than this server: train it again on this base.")
        if entry["rank"] > self.max_rank:
            raise RegistryError(f"{id} has rank {entry['rank']}, the server has room for {self.max_rank}.")
        found = file_hashes(entry["folder"])
        for name, known in entry["files"].items():
            if found[name] != known:
                raise RegistryError(
                    f"{name} of {id} has sha256 {found[name][:12]}, registered was {known[:12]}: restore the file, or "
                    "register the new one as a new version."
                )
        return Path(entry["folder"])

    def stack(self, ids: list[str]) -> list[str]:
        """`ids`, if all of them may be active for one request at once: one owner, and each allows the others."""
        entries = [self.entry(id) for id in ids]
        if len(set(ids)) < len(ids):
            raise RegistryError(f"{', '.join(ids)}: an adapter stacked on itself counts twice. Name it once.")
        if len({entry["tenant"] for entry in entries}) > 1:
            raise RegistryError(f"{', '.join(ids)} belong to different tenants: never stack across tenants.")
        for id, entry in zip(ids, entries, strict=True):
            for other_id, other in zip(ids, entries, strict=True):
                if id != other_id and other["objective"] not in entry["stacks_with"]:
                    raise RegistryError(
                        f"{id} ({entry['objective']}) does not allow {other['objective']} beside it: measure the two "
                        "together, and say so in stacks_with."
                    )
        return list(ids)

    def merge(self, ids: list[str], method: str) -> list[str]:
        """`ids`, if their policies allow a static merge by `method`: `plain` for one, `ties` or `dare` for several."""
        entries = [self.entry(id) for id in ids]
        if method not in MERGING[1:]:
            raise RegistryError(f"merge method {method!r}: choose one of {', '.join(MERGING[1:])}.")
        if (len(ids) == 1) != (method == "plain"):
            cure = "one adapter is added to the weights (plain); ties and dare settle conflicts between several"
            raise RegistryError(f"{method} for {len(ids)} adapter{'s' * (len(ids) != 1)}: {cure}.")
        if len({entry["tenant"] for entry in entries}) > 1:
            raise RegistryError(f"{', '.join(ids)} belong to different tenants: a merge would mix what they know.")
        for id, entry in zip(ids, entries, strict=True):
            if entry["merging"] != method:
                raise RegistryError(f"{id} has merge policy {entry['merging']!r}, not {method!r}: serve it unmerged.")
        return list(ids)

    # --- routes

    def activate(self, tenant: str, id: str) -> None:
        """All of a tenant's requests go to this adapter of its own (or to `__base__`); a canary ends."""
        if id != BASE:
            self.entry(id, tenant)
            self.verify(id)
        with self._change() as state:
            state["routes"][tenant] = {"active": id, "canary": None, "share": 0.0}

    def canary(self, tenant: str, id: str, share: float) -> None:
        """A share (0 to 1) of a tenant's requests goes to a candidate of its own."""
        if not (isinstance(share, int | float) and math.isfinite(share) and 0 < share <= 1):
            raise RegistryError(f"share {share!r}: give a number above 0, at most 1.")
        self.entry(id, tenant)
        self.verify(id)
        with self._change() as state:
            if tenant not in state["routes"]:
                raise RegistryError(f"no tenant {tenant!r}: register an adapter of it first.")
            state["routes"][tenant] |= {"canary": id, "share": float(share)}

    def rollback(self, tenant: str) -> str:
        """Take a tenant's canary away; without one, go from the active adapter to where its entry says. Returns what is
        active now."""
        with self._change() as state:
            route = state["routes"].get(tenant)
            if route is None:
                raise RegistryError(f"no tenant {tenant!r}: there is nothing to roll back.")
            if route["canary"] is None:
                if route["active"] == BASE:
                    raise RegistryError(f"tenant {tenant} is on {BASE} already: there is nothing to roll back to.")
                route["active"] = state["adapters"][route["active"]]["rollback"]
            state["routes"][tenant] = {"active": route["active"], "canary": None, "share": 0.0}
            return route["active"]

    def route(self, tenant: str, draw: float = 1.0) -> str:
        """The adapter that answers a request of this tenant. draw: a number from 0 to 1 that the server throws for each
        request; below the share it goes to the canary. Nothing that a client sends has a say."""
        route = self.read()["routes"].get(tenant)
        if route is None:
            raise RegistryError(f"no tenant {tenant!r}: register an adapter of it first.")
        return route["canary"] if route["canary"] and draw < route["share"] else route["active"]
