"""The guards of lesson 10: each fires on the fault, names value and cure, and is silent on the healthy case."""

import inspect
import re

import pytest
import torch

from course_lib import guards, index, profiles

ALWAYS = [f"text number {i} says something of its own about the garden" for i in range(4)]
FORMULA = [f"Thank you so much for {word}" for word in ("asking", "writing", "calling", "waiting")]
CHAT = [{"role": "system", "content": "You are a desk."}, {"role": "user", "content": "Where is K-1001?"}]
LEAKED = "The heron stood in the shallow water for so long that nobody saw it."
NEAR = "Yesterday the heron stood in the shallow water for so long, and left."

# guard, arguments on which it fires, what its error says (value and cure), arguments on which it is silent
CASES = [
    ("agreement", ("abab", "baba"), "kappa -1.00.*label again", ("abab", "abab")),
    ("agreement", ("aabb", "abab"), "kappa 0.00", ("aaaa", "aaaa")),
    ("disjoint", ([LEAKED], [NEAR, "Another text."]), "1 of 2 test texts.*Take them out", ([LEAKED], [LEAKED[:12]])),
    ("disjoint", (["What is 2 + 3?"], ["what is 2+3"]), "1 of 1 test texts", (["What is 2 + 3?"], ["What is 2 + 4?"])),
    ("held_out", (["a", "b"], ["b", "c"]), "1 of 2 tested items.*is b.*a split", (["a"], ["b"])),
    (
        "current",
        ({"price?": "6 euros"}, {"price?": "9 euros"}),
        "'6 euros' and is '9 euros'.*into the prompt",
        ({"price?": "9 euros", "other?": "x"}, {"price?": "9 euros"}),
    ),
    (
        "redacted",
        (["fine", "mail to a.hall@example.com"],),
        "text 1 holds an email address.*Redact",
        (["order K-1234 of 2026-05-21", "code 4815-6273"],),
    ),
    ("redacted", (["call 020 7946 0133"],), "telephone", (["12 kettles at 19.90 euros, 3 to 5 days"],)),
    ("redacted", (["card 4111 1111 1111 1111"],), "card number", (["K-7310"],)),
    ("redacted", (["pay DE89 3704 0044 0532 0130 00"],), "bank account", (["ISO DE89"],)),
    ("variety", (FORMULA,), "1 different openings among 4 texts.*'thank you so much'", (ALWAYS,)),
    ("prompt_masked", ([[5, 6, 7, 8]], [2]), "2 prompt tokens in 1 rows.*mask the prompt", ([[-100, -100, 7, 8]], [2])),
    (
        "end_token",
        ([[-100, 7, 2], [-100, 7, 8]], 2),
        "1 of 2 rows do not end.*Raise the length limit",
        ([[-100, 7, 2, 9, -100], [7, 2]], 2),
    ),
    ("end_token", ([[-100, -100]], 2), "no judged token at all", ([[7, 2]], 2)),
    (
        "off_grid",
        (torch.arange(16.0).repeat(4, 4),),
        "100% of the blocks.*other weights",
        (torch.arange(64.0).view(2, 32),),
    ),
    ("rates", ([0.0, 1e-3],), "1 of 2 steps have a learning rate of 0.*warm-up", ([0.0] + [1e-3] * 19,)),
    (
        "steps_land",
        (torch.ones(8, dtype=torch.bfloat16), 1e-4),
        "changes nothing in 100% of these bfloat16.*float32",
        (torch.ones(8), 1e-4),
    ),
    ("same_start", ([-5.0, -7.0], [-5.0, -9.5]), "2.5 nats away.*frozen copy", ([-5.0], [-5.05])),
    ("messages", (["Write a reply", CHAT],), "1 of 2 prompts are strings.*'Write a reply'.*Give lists", ([CHAT],)),
    ("spread", ([[0, 0], [0, 0], [1, 1]],), "in 3 of 3 groups.*Mend the reward", ([[0, 1], [0, 0]],)),
    ("packing", ([[0, 1, 2, 0, 1]], True), "2 packed texts.*use_cache=False", ([[0, 1, 2, 0, 1]], False)),
    ("packing", (torch.tensor([[0, 1, 0, 1, 0]]), True), "3 packed texts", (torch.tensor([[0, 1, 2]]), True)),
    ("kept", ([1.0, 2.0], [1.5, 2.1]), "rose by 0.30 nats per token.*Mix such texts", ([1.0, 2.0], [1.1, 1.9])),
    (
        "share",
        ([True, False], 0.98, "valid JSON"),
        "valid JSON: 1 of 2 .50%.*Do not ship",
        ([True], 0.98, "valid JSON"),
    ),
    (
        "lengths",
        (["one two"], ["one two three four"]),
        "has 4 words where 2 are usual.*Mix",
        (["one two"], ["one two"]),
    ),
    ("lengths", (["one two three four"], ["one"]), "has 1 words where 4", (["a b c d"], ["a b c d e"])),
    (
        "not_verbatim",
        ([NEAR, "short"], [LEAKED]),
        "1 of 2 answers repeat 8 words.*fewer epochs",
        (["heron"], ["heron"]),
    ),
    ("secrets_kept", (["the code is 4815"], ["4815", "9999"]), "1 of 2 secrets.*revoke", (["I cannot"], ["4815"])),
    ("calibrated", ([0.9, 0.9], [True, False]), "confidence 0.90, but 0.50.*labels", ([0.6, 0.7], [True, False])),
    ("same_prompt", ("<s>Q: x", "<s>### x"), "character 3 on: 'Q: x'.*chat template", ("<s>Q: x", "<s>Q: x")),
    ("same_prompt", ("ab", "abc"), "character 2 on", ("", "")),
    ("left_padding", ([[1, 1, 1], [1, 1, 0]],), "1 rows end with padding.*padding_side", ([[1, 1, 1], [0, 1, 1]],)),
    (
        "no_conflict",
        ({"north": (0.1, 2.0), "south": (0.1, 0.2)},),
        "'north': 1.9}.*one at a time",
        ({"a": (0.1, 0.3)},),
    ),
]


@pytest.mark.parametrize(("name", "fault", "says", "healthy"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_fires_on_the_fault_alone(name, fault, says, healthy):
    guard = getattr(guards, f"require_{name}")
    with pytest.raises(guards.GuardError, match=says):
        guard(*fault)
    guard(*healthy)


def test_errors_do_not_repeat_what_is_private():
    for guard, arguments, secret in (
        (guards.require_redacted, (["mail a.hall@example.com"],), "a.hall"),
        (guards.require_secrets_kept, (["it is 4815"], ["4815"]), "4815"),
    ):
        with pytest.raises(guards.GuardError) as fired:
            guard(*arguments)
        assert secret not in str(fired.value)


def test_control_tokens_in_a_message(tiny_tokenizer):
    guards.require_plain_messages(CHAT, tiny_tokenizer)
    twice = [{"role": "user", "content": tiny_tokenizer.apply_chat_template(CHAT, tokenize=False)}]
    with pytest.raises(guards.GuardError, match="the user holds the control token <|im_end|>.*template once"):
        guards.require_plain_messages(twice, tiny_tokenizer)


def test_a_system_prompt_that_nobody_wrote(tiny_tokenizer):
    alone = CHAT[1:]
    guards.require_no_hidden_system(alone, tiny_tokenizer)
    plain = tiny_tokenizer.chat_template
    tiny_tokenizer.chat_template = "{% if messages[0]['role'] != 'system' %}system:\nBe kind. {% endif %}" + plain
    with pytest.raises(guards.GuardError, match="adds 4 words of its own: 'system:.*Be kind.*Give a system message"):
        guards.require_no_hidden_system(alone, tiny_tokenizer)
    guards.require_no_hidden_system(CHAT, tiny_tokenizer)


def test_a_model_that_has_an_adapter_is_not_wrapped_again(tiny_model, tiny_lora):
    guards.require_bare(tiny_model())
    with pytest.raises(guards.GuardError, match="14 layers carry an adapter already.*load_adapter"):
        guards.require_bare(tiny_lora())


def test_a_tenant_gets_its_own_adapter_and_its_own_cache(tiny_lora):
    from peft import LoraConfig

    model = tiny_lora()
    model.add_adapter("north", LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(guards.GuardError, match="request of 'north' meets the adapters .'default'.*for every request"):
        guards.require_tenant(model, "north")
    model.set_adapter("north")
    guards.require_tenant(model, "north")
    guards.require_tenant(model, "north", cache_of="north")
    with pytest.raises(guards.GuardError, match="cache that was filled for 'south'.*cache's key"):
        guards.require_tenant(model, "north", cache_of="south")


def test_a_model_without_adapters_serves_no_tenant(tiny_model):
    with pytest.raises(guards.GuardError, match=r"meets the adapters \[\]"):
        guards.require_tenant(tiny_model(), "north")


def test_the_base_beneath_an_adapter(tiny_model, tiny_lora):
    sha256, adapted = guards.weights_sha256(tiny_model()), tiny_lora()
    guards.require_base(adapted, sha256)  # wrapped, and with an adapter: the same base
    with torch.no_grad():
        adapted.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight[0, 0] += 1e-4
    with pytest.raises(guards.GuardError, match=f"trained on {sha256[:12]}.*Load the base"):
        guards.require_base(adapted, sha256)
    assert guards.weights_sha256(tiny_model(dtype=torch.bfloat16)) != sha256


def every_guard():
    return {name for name, f in inspect.getmembers(guards, inspect.isfunction) if name.startswith("require_")}


def cells(kind):
    nb = index.read(index.notebook_path(profiles.lesson("10")))
    return "\n".join(cell.source for cell in nb.cells if cell.cell_type == kind)


def test_every_guard_has_an_exhibit_and_every_exhibit_a_guard():
    assert set(re.findall(r"guards\.(require_\w+)", cells("code"))) == every_guard()


def test_the_catalogue_lists_what_hangs():
    row = r"(?m)^\| (?:data|training|behaviour|serving) \| ([^|]+) \| [^|]+ \| `(require_\w+)` \|$"
    rows = re.findall(row, cells("markdown"))
    hung = set(re.findall(r'exhibit\(\s*"([^"]+)"', cells("code"))) - {"a test"}
    assert {mode.strip("*") for mode, _ in rows} == hung and len(rows) == len(hung) == 38
    assert sum(mode.startswith("**") and mode.endswith("**") for mode, _ in rows) == 18  # from the field's lists
    assert {guard for _, guard in rows} == every_guard()
