import copy
import errno
import json
import types

import pytest

from course_lib import CourseError, hardware, models, profiles, recipes, tickets

SETTINGS = {
    "rank": 4, "alpha": 8, "learning_rate": 1e-3, "batch_size": 2, "schedule": "cosine", "warmup": 0.05, "beta2": 0.95
}  # fmt: skip
RECIPES = {
    "ticket_lora": SETTINGS | {"epochs": 1, "sizes": {"ci": {"train": 8}, "cpu": {"train": 64}}, "minutes": {"ci": 1}},
    "other": SETTINGS,
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Two recipes, a cache and training data of this test's own; returns the table of recipes, to be changed."""
    table, data = copy.deepcopy(RECIPES), tmp_path / "data"
    (data / "tickets").mkdir(parents=True)
    (data / "tickets" / "train.jsonl").write_text("one\n")
    monkeypatch.setattr(profiles, "index", lambda: {"recipes": table})
    monkeypatch.setattr(tickets, "DATA", data)
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "the cache"))
    return table


# --- settings and examples -------------------------------------------------------------------------------------------


def test_settings_fall_back_to_cpu():
    assert vars(recipes.settings("ticket_lora", "ci")) == SETTINGS | {"epochs": 1, "train": 8}
    assert recipes.settings("ticket_lora", "full").train == recipes.settings("ticket_lora", "cpu").train == 64


def test_an_unknown_recipe_names_the_valid_ones():
    with pytest.raises(CourseError, match="no recipe 'tickets'. The recipes are ticket_lora, other"):
        recipes.settings("tickets", "ci")


RECORD = {
    "id": "dev-1",
    "received": "2026-01-05",
    "text": "Two lamps by Friday.",
    "due_phrase": "Friday",
    "ticket": {
        "intent": "buy",
        "items": [{"product": "lamp", "quantity": 2}],
        "order_id": None,
        "due_date": "2026-01-09",
        "needs_human": False,
        "priority": "high",
    },
}


def test_examples_ask_for_the_customers_words_for_the_date():
    (row,) = recipes.examples([RECORD])
    assert [m["role"] for m in row["prompt"]] == ["system", "user"] and row["prompt"][1]["content"] == RECORD["text"]
    assert [m["role"] for m in row["completion"]] == ["assistant"]
    parsed = tickets.parse(row["completion"][0]["content"])
    assert parsed.ticket["due_date"] == "Friday"
    assert tickets.exact(RECORD["ticket"], tickets.resolve(parsed.ticket, RECORD["received"]))


def test_a_method_that_does_not_exist_is_refused(place):
    place["other"]["method"] = "lroa"
    with pytest.raises(CourseError, match="lroa.*lora, dora, qlora, full"):
        recipes.settings("other", "ci")


def rehearse(monkeypatch, n=3):
    folder = tickets.DATA / "general"
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"prompt": f"q{i}", "response": f"a{i}"}) for i in range(n)]
    (folder / "rehearsal.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(tickets, "load", lambda split, n: [RECORD] * n)


@pytest.mark.parametrize(("share", "general"), [(0, 0), (0.05, 1), (0.2, 5), (0.5, 19)])
def test_rehearsal_is_a_share_of_all_examples_and_starts_again(monkeypatch, share, general):
    rehearse(monkeypatch)
    rows = recipes.training_rows(types.SimpleNamespace(train=19, rehearsal=share))
    assert len(rows) == 19 + general
    asked = [row["prompt"][-1]["content"] for row in rows[19:]]
    assert asked == [f"q{i % 3}" for i in range(general)]
    assert rows[:19] == recipes.training_rows(types.SimpleNamespace(train=19))


def test_shuffled_labels_give_each_ticket_another_record(monkeypatch):
    monkeypatch.setattr(tickets, "load", lambda split, n: range(n))
    monkeypatch.setattr(recipes, "examples", lambda records: [{"prompt": n, "completion": f"of {n}"} for n in records])
    rows = recipes.training_rows(types.SimpleNamespace(train=3, shuffled_labels=True))
    assert rows == [{"prompt": n, "completion": f"of {(n + 1) % 3}"} for n in range(3)]


def test_the_key_holds_the_rehearsal_data_where_there_is_rehearsal(place, monkeypatch):
    place["other"] |= {"rehearsal": 0.05}
    rehearse(monkeypatch, 3)
    before = [recipes.key(name, "ci", 0) for name in ("ticket_lora", "other")]
    rehearse(monkeypatch, 4)
    after = [recipes.key(name, "ci", 0) for name in ("ticket_lora", "other")]
    assert before[0] == after[0] and before[1] != after[1]


# --- the key ---------------------------------------------------------------------------------------------------------


def change_settings(table, monkeypatch):
    table["ticket_lora"]["learning_rate"] = 2e-3


def change_size(table, monkeypatch):
    table["ticket_lora"]["sizes"]["ci"]["train"] = 9


def change_prompt(table, monkeypatch):
    monkeypatch.setattr(tickets, "SYSTEM", "Another instruction.")


def change_data(table, monkeypatch):
    (tickets.DATA / "tickets" / "train.jsonl").write_text("two\n")


def change_base(table, monkeypatch):
    monkeypatch.setattr(models, "GGUF_SHA256", "0" * 64)


def change_version(table, monkeypatch):
    monkeypatch.setattr(hardware, "versions", lambda: {"torch": "2", "transformers": "5", "trl": "1", "peft": "9"})


def change_dtype(table, monkeypatch):
    monkeypatch.setattr(hardware, "dtype", lambda: "another")


@pytest.mark.parametrize(
    "change",
    [change_settings, change_size, change_prompt, change_data, change_base, change_version, change_dtype],
)
def test_the_key_changes_with_each_ingredient(place, monkeypatch, change):
    before = recipes.key("ticket_lora", "ci", 0)
    assert recipes.key("ticket_lora", "ci", 0) == before
    change(place, monkeypatch)
    assert recipes.key("ticket_lora", "ci", 0) != before


def test_the_key_changes_with_profile_and_seed_and_not_with_minutes(place):
    before = recipes.key("ticket_lora", "ci", 0)
    assert len({before, recipes.key("ticket_lora", "cpu", 0), recipes.key("ticket_lora", "ci", 1)}) == 3
    place["ticket_lora"]["minutes"]["ci"] = 7
    assert recipes.key("ticket_lora", "ci", 0) == before


def test_the_cache_is_where_course_cache_says(tmp_path):
    folder = recipes.cached("ticket_lora", "ci", 3)
    assert folder.parent == tmp_path / "the cache" / "adapters" and folder.name.startswith("ticket_lora-ci-3-")


# --- saving ----------------------------------------------------------------------------------------------------------


def same_logits(a, b):
    import torch

    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        return torch.equal(a(ids).logits, b(ids).logits)


def test_a_saved_adapter_loads_with_plain_peft(tiny_model, tiny_lora, tmp_path):
    from peft import PeftModel

    model = tiny_lora()
    folder = recipes.save(model, tmp_path / "adapters" / "a b", {"losses": [(1, 2.5)]})
    loaded = PeftModel.from_pretrained(tiny_model(), str(folder)).eval()
    assert same_logits(loaded, model) and not same_logits(loaded, tiny_model())
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "training.json"}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == models.BASE_NAME
    assert json.loads((folder / "training.json").read_text()) == {"losses": [[1, 2.5]]}
    assert [path.name for path in folder.parent.iterdir()] == ["a b"]


def test_a_fully_tuned_model_is_saved_and_loaded_as_a_whole(place, tiny_model, monkeypatch):
    import torch

    place["other"]["method"] = "full"
    monkeypatch.setattr(hardware, "dtype", lambda: torch.bfloat16)
    model = tiny_model()
    model.model.rotary_emb.inv_freq += 0.001  # not a bfloat16 number
    frequencies = model.model.rotary_emb.inv_freq.clone()
    folder = recipes.keep(recipes.for_use(model), "other", "ci", 0, {"losses": []})
    assert model.dtype == torch.bfloat16 and torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "training.json"}
    assert recipes.adapter("other", "ci") == folder
    loaded = recipes.load("other", "ci")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_saving_again_replaces(tiny_lora, tmp_path):
    folder = recipes.save(tiny_lora(), tmp_path / "a", {"losses": []})
    (folder / "left over").write_text("x")
    recipes.save(tiny_lora(), folder)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_what_was_there(tiny_lora, tmp_path, error):
    folder = recipes.save(tiny_lora(), tmp_path / "a", {"losses": [[1, 1.0]]})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    class Failing:
        def save_pretrained(self, place, **options):
            (place / "adapter_model.safetensors").write_text("half")
            raise error

    expected = CourseError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as raised:
        recipes.save(Failing(), folder)
    if expected is CourseError:
        assert "No space left" in str(raised.value) and "COURSE_OUT" in str(raised.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.glob("*a*") if path.name.startswith(".making")] == []


# --- training --------------------------------------------------------------------------------------------------------


def test_adapter_trains_once(tiny_lora, monkeypatch, capsys):
    trained = []

    def prepare(name, profile, seed):
        log = [{"step": 5, "loss": 1.5}, {"train_runtime": 3}]
        trainer = types.SimpleNamespace(
            train=lambda: trained.append((name, profile, seed)), state=types.SimpleNamespace(log_history=log)
        )
        return tiny_lora(), trainer

    monkeypatch.setattr(recipes, "prepare", prepare)
    folder = recipes.adapter("ticket_lora", "ci")
    assert "ticket_lora is not in the cache for profile ci, seed 0" in capsys.readouterr().out
    assert json.loads((folder / "training.json").read_text()) == {"losses": [[5, 1.5]]}
    assert recipes.adapter("ticket_lora", "ci") == folder == recipes.cached("ticket_lora", "ci", 0)
    assert trained == [("ticket_lora", "ci", 0)] and capsys.readouterr().out == ""
    assert recipes.adapter("ticket_lora", "ci", seed=1) != folder and len(trained) == 2


def test_dora_is_lora_with_a_magnitude(tiny_model):
    names = {}
    for method in ("lora", "dora"):
        s = types.SimpleNamespace(**SETTINGS, method=method)
        names[method] = {n for n, p in recipes.add_lora(tiny_model(), s).named_parameters() if p.requires_grad}
    assert names["lora"] < names["dora"]
    assert all("lora_magnitude_vector" in name for name in names["dora"] - names["lora"])


def test_doras_lengths_are_float32_and_come_back_unrounded(tiny_model, monkeypatch, tmp_path):
    """In bfloat16 a step of training is lost in a length near 4, without a word."""
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(hardware, "device", lambda: "cpu")
    s = types.SimpleNamespace(**SETTINGS, method="dora")
    model = recipes.add_lora(tiny_model(dtype=torch.bfloat16), s)
    lengths = {n: p for n, p in model.named_parameters() if "magnitude" in n}
    assert {p.dtype for p in lengths.values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "lora_A" in n} == {torch.bfloat16}
    for parameter in lengths.values():
        parameter.data += 0.001  # less than bfloat16 can say
    folder = recipes.save(model, tmp_path / "dora")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda where, **kw: tiny_model(dtype=torch.bfloat16))
    loaded = models.load("somewhere", adapter=folder)
    for name, parameter in loaded.named_parameters():
        assert name not in lengths or torch.equal(parameter, lengths[name])


def test_full_training_moves_float32_weights_and_gives_the_hardwares_dtype_back(
    place, tiny_model, tiny_tokenizer, monkeypatch
):
    import torch

    place["other"] |= {"method": "full", "epochs": 1, "train": 4}
    monkeypatch.setattr(hardware, "device", lambda: "cpu")
    monkeypatch.setattr(hardware, "dtype", lambda: torch.bfloat16)
    monkeypatch.setattr(models, "load", lambda name, dtype: tiny_model(dtype=dtype))
    monkeypatch.setattr(models, "load_tokenizer", lambda name: tiny_tokenizer)
    monkeypatch.setattr(tickets, "load", lambda split, n: [RECORD] * n)
    model, trainer = recipes.prepare("other", "ci", max_steps=2, logging_steps=1)
    assert trainer.args.bf16 and {p.dtype for p in model.parameters()} == {torch.float32}
    before = [p.detach().clone() for p in model.parameters()]
    trainer.train()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert all(moved)
    used = recipes.for_use(model)
    assert used is model and used.dtype == torch.bfloat16 and not used.training
    assert used(torch.arange(3, 9)[None]).logits.dtype == torch.bfloat16  # no mixed precision is left around it


@pytest.fixture
def four_bit_base(tiny_model, tiny_tokenizer, tmp_path, monkeypatch, place):
    """The recipe `other` as QLoRA on a folder that holds the tiny model; returns the folder."""
    folder = tmp_path / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    place["other"] |= {"method": "qlora", "epochs": 1, "train": 4, "base": str(folder)}
    monkeypatch.setattr(hardware, "device", lambda: "cpu")
    monkeypatch.setattr(tickets, "load", lambda split, n: [RECORD] * n)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_qlora_trains_an_adapter_over_four_bits_and_comes_back_from_the_cache(four_bit_base, monkeypatch, dtype):
    import torch

    from course_lib import guards

    wanted = getattr(torch, dtype)
    monkeypatch.setattr(hardware, "dtype", lambda: wanted)
    model, trainer = recipes.prepare("other", "ci", max_steps=2, logging_steps=1)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {wanted}  # TRL makes bfloat16 of them
    frozen = [p for p in model.parameters() if hasattr(p, "quant_state")]
    before = [p.detach().clone() for p in frozen]
    assert len(frozen) == 14 and {p.dtype for p in frozen} == {torch.uint8}
    trainer.train()
    assert len(recipes.losses(trainer)) == 2 and not guards.repacked(model)
    assert all(torch.equal(p, q) for p, q in zip(frozen, before, strict=True))
    folder = recipes.keep(recipes.for_use(model), "other", "ci", 0, {"losses": []})
    assert recipes.adapter("other", "ci") == folder
    loaded = recipes.load("other", "ci")
    assert any(hasattr(p, "quant_state") for p in loaded.parameters())
    assert same_logits(loaded, model)


def test_a_base_of_the_hub_keeps_its_name(tiny_lora, tmp_path):
    model = tiny_lora()
    model.peft_config["default"].base_model_name_or_path = "Qwen/Qwen2.5-1.5B-Instruct"
    config = json.loads((recipes.save(model, tmp_path / "a") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Qwen/Qwen2.5-1.5B-Instruct"


def test_the_key_of_qlora_holds_who_keeps_the_four_bits(four_bit_base, monkeypatch):
    before = recipes.key("other", "ci", 0)
    monkeypatch.setattr(models, "four_bit_backend", lambda: "unsloth")
    assert recipes.key("other", "ci", 0) != before


def test_the_trainer_learns_and_takes_the_end_token_into_the_loss(tiny_model, tiny_tokenizer, monkeypatch):
    import torch

    monkeypatch.setattr(hardware, "device", lambda: "cpu")
    s = recipes.settings("ticket_lora", "ci")
    model = recipes.add_lora(tiny_model(), s)
    rows = recipes.examples([RECORD] * 4)
    trainer = recipes.sft_trainer(model, tiny_tokenizer, rows, s, seed=0, max_steps=3, logging_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    learnt = tiny_tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert learnt.strip() == rows[0]["completion"][0]["content"] + "<|im_end|>"  # the completion alone
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    logged = recipes.losses(trainer)
    assert [step for step, _ in logged] == [1, 2, 3] and all(0 < loss < 100 for _, loss in logged)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
