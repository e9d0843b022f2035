"""The registry takes in what fits its base, refuses the rest with value and cure, and keeps tenants apart."""

import json
import shutil

import pytest
from filelock import FileLock

from course_lib import registry
from course_lib.registry import BASE, Registry, RegistryError

HOST = {"base": "b" * 64, "tokenizer": "t" * 64}
ABOUT = {"tenant": "north", "objective": "sft", "system": "Be brief.", **HOST}


@pytest.fixture
def folder(tiny_lora, tmp_path):
    path = tmp_path / "adapter"
    tiny_lora().save_pretrained(path)
    (path / "README.md").unlink(missing_ok=True)
    return path


@pytest.fixture
def book(tmp_path):
    return Registry(tmp_path / "registry.json", **HOST, max_rank=8)


def other(folder, name, **changes):
    """A copy of an adapter with other values in its configuration."""
    copy = folder.parent / name
    shutil.copytree(folder, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | changes))
    return copy


def test_an_entry_holds_what_the_server_must_know(book, folder):
    entry = book.register("tiny.tickets.v1", folder, **ABOUT)
    assert entry["rank"] == 4 and entry["alpha"] == 8 and "q_proj" in entry["modules"]
    assert entry["files"] == registry.file_hashes(folder) and set(entry["files"]) == set(registry.FILES)
    again = Registry(book.path, **HOST, max_rank=8)
    assert again.entry("tiny.tickets.v1") == entry and again.verify("tiny.tickets.v1") == folder


@pytest.mark.parametrize(
    ("id", "change", "said"),
    [
        ("tickets", {}, "'tickets' is not of the form"),
        ("../x.tickets.v1", {}, "not of the form"),
        ("tiny.tickets.v0", {}, "not of the form"),
        ("tiny.tickets.v1\n", {}, "not of the form"),
        ("tiny.tickets.v1", {"tenant": "North/.."}, "tenant 'North/..'"),
        ("tiny.tickets.v1", {"objective": " "}, "no objective"),
        ("tiny.tickets.v1", {"merging": "sum"}, "merge policy 'sum'"),
        ("tiny.tickets.v1", {"base": "c" * 64}, "base cccccccccccc, this server runs bbbbbbbbbbbb"),
        ("tiny.tickets.v1", {"tokenizer": "u" * 64}, "tokenizer uuuuuuuuuuuu"),
        ("tiny.tickets.v1", {"rollback": "tiny.tickets.v9"}, "tiny.tickets.v9, which is not registered"),
    ],
)
def test_what_does_not_fit_is_refused(book, folder, id, change, said):
    with pytest.raises(RegistryError) as error:
        book.register(id, folder, **ABOUT | change)
    assert said in str(error.value)
    assert not book.path.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": 8}, "says rank 8, its matrices have 4"),
        ({"use_dora": True}, "method DORA"),
        ({"peft_type": "IA3"}, "method IA3"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole layers (lm_head)"),
    ],
)
def test_configurations_that_cannot_share_a_base_are_refused(book, folder, change, said):
    with pytest.raises(RegistryError, match=said.replace("(", r"\(").replace(")", r"\)")):
        book.register("tiny.tickets.v1", other(folder, "changed", **change), **ABOUT)


def test_room_for_ranks(tmp_path, folder):
    small = Registry(tmp_path / "small.json", **HOST, max_rank=2)
    with pytest.raises(RegistryError, match="rank 4, the server has room for 2"):
        small.register("tiny.tickets.v1", folder, **ABOUT)


def test_files_that_are_missing_broken_or_could_run(book, folder):
    from safetensors.torch import load_file, save_file

    bare = other(folder, "bare")
    (bare / "adapter_model.safetensors").unlink()
    with pytest.raises(RegistryError, match="lacks adapter_model.safetensors"):
        book.register("tiny.tickets.v1", bare, **ABOUT)
    pickled = other(folder, "pickled")
    (pickled / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(RegistryError, match="could run code"):
        book.register("tiny.tickets.v1", pickled, **ABOUT)
    cut = other(folder, "cut")
    (cut / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes()[:100])
    with pytest.raises(RegistryError, match="cannot be read"):
        book.register("tiny.tickets.v1", cut, **ABOUT)
    (cut / "adapter_config.json").write_text("{")
    with pytest.raises(RegistryError, match="is not JSON"):
        book.register("tiny.tickets.v1", cut, **ABOUT)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    broken, extra = other(folder, "broken"), other(folder, "extra")
    save_file(tensors | {name: tensors[name] * float("nan")}, broken / "adapter_model.safetensors")
    with pytest.raises(RegistryError, match="not finite"):
        book.register("tiny.tickets.v1", broken, **ABOUT)
    save_file(tensors | {"base_model.model.lm_head.weight": tensors[name].clone()}, extra / "adapter_model.safetensors")
    with pytest.raises(RegistryError, match="no LoRA matrix"):
        book.register("tiny.tickets.v1", extra, **ABOUT)


def test_one_changed_byte_is_found(book, folder):
    book.register("tiny.tickets.v1", folder, **ABOUT)
    for name in registry.FILES:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(RegistryError, match=f"{name} of tiny.tickets.v1 has sha256"):
            book.verify("tiny.tickets.v1")
        with pytest.raises(RegistryError):
            book.activate("north", "tiny.tickets.v1")
        (folder / name).write_bytes(data)
    book.activate("north", "tiny.tickets.v1")


def test_a_server_with_another_base_does_not_load_it(book, folder):
    book.register("tiny.tickets.v1", folder, **ABOUT)
    with pytest.raises(RegistryError, match="another base or tokenizer"):
        Registry(book.path, base="c" * 64, tokenizer=HOST["tokenizer"], max_rank=8).verify("tiny.tickets.v1")
    with pytest.raises(RegistryError, match="room for 2"):
        Registry(book.path, **HOST, max_rank=2).verify("tiny.tickets.v1")


def test_entries_never_change_and_names_have_one_owner(book, folder):
    book.register("tiny.tickets.v1", folder, **ABOUT)
    with pytest.raises(RegistryError, match="raise the version"):
        book.register("tiny.tickets.v1", folder, **ABOUT)
    with pytest.raises(RegistryError, match="a name of another tenant"):
        book.register("tiny.tickets.v2", folder, **ABOUT | {"tenant": "south"})


def test_tenants_do_not_see_each_other(book, folder):
    book.register("tiny.tickets.v1", folder, **ABOUT)
    book.register("tiny.routes.v1", folder, **ABOUT | {"tenant": "south"})
    with pytest.raises(RegistryError) as foreign:
        book.activate("north", "tiny.routes.v1")
    with pytest.raises(RegistryError) as unknown:
        book.activate("north", "tiny.nothing.v1")
    assert str(foreign.value).replace("routes", "nothing") == str(unknown.value)
    with pytest.raises(RegistryError, match="no adapter 'tiny.routes.v1' for tenant north"):
        book.canary("north", "tiny.routes.v1", 0.5)
    with pytest.raises(RegistryError, match="of another tenant: name one of north"):
        book.register("tiny.tickets.v2", folder, **ABOUT | {"rollback": "tiny.routes.v1"})
    assert book.route("north") == BASE


def test_stacking(book, folder):
    def put(id, tenant, objective, allows=()):
        about = ABOUT | {"tenant": tenant, "objective": objective, "stacks_with": allows}
        book.register(id, folder, **about)

    put("tiny.tickets.v1", "north", "sft", ("guard",))
    put("tiny.guard.v1", "north", "guard", ("sft", "guard"))
    put("tiny.style.v1", "north", "dpo", ("sft",))
    put("tiny.other.v1", "south", "guard", ("sft",))
    assert book.stack(["tiny.tickets.v1", "tiny.guard.v1"]) == ["tiny.tickets.v1", "tiny.guard.v1"]
    for ids, said in (
        (["tiny.tickets.v1", "tiny.style.v1"], r"tiny.tickets.v1 \(sft\) does not allow dpo"),
        (["tiny.tickets.v1", "tiny.tickets.v1"], "counts twice"),
        (["tiny.tickets.v1", "tiny.other.v1"], "never stack across tenants"),
        (["tiny.tickets.v1", "tiny.gone.v1"], "no adapter 'tiny.gone.v1'"),
    ):
        with pytest.raises(RegistryError, match=said):
            book.stack(ids)


def test_merging(book, folder):
    book.register("tiny.tickets.v1", folder, **ABOUT | {"merging": "plain"})
    book.register("tiny.tickets.v2", folder, **ABOUT | {"merging": "ties"})
    book.register("tiny.tickets.v3", folder, **ABOUT | {"merging": "ties"})
    book.register("tiny.routes.v1", folder, **ABOUT | {"merging": "ties", "tenant": "south"})
    assert book.merge(["tiny.tickets.v1"], "plain") and book.merge(["tiny.tickets.v2", "tiny.tickets.v3"], "ties")
    for ids, method, said in (
        (["tiny.tickets.v2"], "ties", "ties for 1 adapter: one adapter is added to the weights"),
        (["tiny.tickets.v2", "tiny.tickets.v3"], "plain", "plain for 2 adapters"),
        (["tiny.tickets.v2"], "plain", "has merge policy 'ties', not 'plain'"),
        (["tiny.tickets.v2", "tiny.routes.v1"], "ties", "different tenants"),
        (["tiny.tickets.v2"], "average", "merge method 'average'"),
    ):
        with pytest.raises(RegistryError, match=said):
            book.merge(ids, method)


def test_routes_canary_and_rollback(book, folder):
    book.register("tiny.tickets.v1", folder, **ABOUT)
    book.register("tiny.tickets.v2", folder, **ABOUT | {"rollback": "tiny.tickets.v1"})
    assert book.route("north") == BASE
    book.activate("north", "tiny.tickets.v1")
    book.canary("north", "tiny.tickets.v2", 0.25)
    assert [book.route("north", draw) for draw in (0.0, 0.2499, 0.25, 1.0)] == ["tiny.tickets.v2"] * 2 + [
        "tiny.tickets.v1"
    ] * 2
    assert book.rollback("north") == "tiny.tickets.v1" and book.route("north", 0.0) == "tiny.tickets.v1"
    book.activate("north", "tiny.tickets.v2")
    assert book.rollback("north") == "tiny.tickets.v1" and book.rollback("north") == BASE
    with pytest.raises(RegistryError, match="nothing to roll back to"):
        book.rollback("north")
    for share in (0, -1, 1.5, float("nan"), "all", None):
        with pytest.raises(RegistryError, match="share"):
            book.canary("north", "tiny.tickets.v2", share)
    for call in (book.rollback, book.route):
        with pytest.raises(RegistryError, match="no tenant 'east'"):
            call("east")


def test_a_broken_file_is_named(book):
    for text in ("{", "[]", '{"adapters": []}', '{"adapters": [], "routes": {}}'):
        book.path.write_text(text)
        with pytest.raises(RegistryError, match="registry.json is no registry"):
            book.read()


def test_a_change_that_fails_leaves_the_file_as_it_was(book, folder, monkeypatch):
    book.register("tiny.tickets.v1", folder, **ABOUT)
    before = book.path.read_text()

    def full(path, data):
        raise OSError("no space left")

    monkeypatch.setattr(registry.results, "write_json", full)
    with pytest.raises(OSError):
        book.activate("north", "tiny.tickets.v1")
    assert book.path.read_text() == before
    assert not FileLock(f"{book.path}.lock").is_locked


def test_hashes_follow_what_counts(tmp_path, tiny_model, tiny_tokenizer):
    tiny_model().save_pretrained(tmp_path)
    first = registry.base_hash(tmp_path)
    assert registry.base_hash(tmp_path) == first and len(first) == 64
    config = tmp_path / "config.json"
    config.write_text(config.read_text() + " ")
    assert registry.base_hash(tmp_path) != first
    with pytest.raises(RegistryError, match="is no base model"):
        registry.base_hash(tmp_path / "nothing")
    one = registry.tokenizer_hash(tiny_tokenizer)
    tiny_tokenizer.chat_template += " "
    assert registry.tokenizer_hash(tiny_tokenizer) != one
