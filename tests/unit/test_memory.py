import json

import pytest

from course_lib import CourseError, memory


def tiny_shape(config):
    return memory.Shape(
        "tiny",
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
        config.tie_word_embeddings,
    )


# Parameter counts as the models' own files have them.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("SmolLM2-135M", 134_515_008),
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen2.5-1.5B", 1_543_714_304),
        ("SmolLM2-1.7B", 1_711_376_384),
        ("Qwen2.5-3B", 3_085_938_688),
        ("Llama-2-7B", 6_738_415_616),
        ("Mistral-7B", 7_241_732_096),
        ("Qwen2.5-7B", 7_615_616_512),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Llama-2-13B", 13_015_864_320),
        ("Qwen2.5-14B", 14_770_033_664),
        ("Llama-2-70B", 68_976_648_192),
    ],
)
def test_counts(name, parameters):
    assert memory.shape(name).parameters == parameters


@pytest.mark.parametrize("name", ["14B", "14b", "qwen2.5-14b", "Qwen/Qwen2.5-14B-Instruct"])
def test_a_shape_by_its_names(name):
    assert memory.shape(name).name == "Qwen2.5-14B"


@pytest.mark.parametrize("name", ["GPT-9", "", "B", "2"])
def test_an_unknown_shape_names_the_known_ones(name):
    with pytest.raises(CourseError, match="no shape.*SmolLM2-135M.*Llama-2-70B"):
        memory.shape(name)


def test_a_size_that_two_models_have():
    with pytest.raises(CourseError, match="'7B' may be Llama-2-7B or Mistral-7B or Qwen2.5-7B"):
        memory.shape("7B")


def test_a_folder_with_a_config(tmp_path, tiny_model):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    assert memory.shape(str(tmp_path)).parameters == model.num_parameters()
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4}))
    with pytest.raises(CourseError, match="says no shape"):
        memory.shape(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "'magic'.*full, lora, qlora"),
        ({"optimizer": "sgd"}, "'sgd'.*adamw"),
        ({"rank": 0}, "rank 0"),
        ({"length": -1}, "length -1"),
    ],
)
def test_what_cannot_be_planned(change, message):
    with pytest.raises(CourseError, match=message):
        memory.plan(memory.shape("8B"), **{"method": "lora"} | change)


def test_qlora_by_hand():
    s = memory.shape("Llama-2-7B")
    planned = memory.plan(s, "qlora")
    frozen = planned.parameters - 4 * sum(s.adapter(16))
    assert frozen + planned.buffers == pytest.approx(s.linear * 4.127 / 8 + 2 * s.rest, rel=1e-3)
    assert frozen + planned.buffers == pytest.approx(3.87e9, rel=2e-3)
    assert memory.plan(s, "full").counted == pytest.approx(16 * s.parameters, rel=1e-6)
    assert sum(s.adapter(16)) == 39_976_960  # what PEFT counts for rank 16 on all linear layers


def test_the_eight_bit_optimizer_leaves_small_tensors_alone():
    assert memory._optimizer_bytes(4096, "adamw_8bit", 4) == 2 * (4096 + 4 * 16)
    assert memory._optimizer_bytes(4095, "adamw_8bit", 4) == 8 * 4095


def test_what_a_t4_holds():
    rows = {row["model"]: row for row in memory.table("t4", optimizer="adamw_8bit")}
    assert list(rows) == list(memory.TABLE)
    assert rows["Qwen2.5-0.5B"]["full fits"] and not rows["SmolLM2-1.7B"]["full fits"]
    assert rows["Llama-3.1-8B"]["qlora fits"] and not rows["Llama-3.1-8B"]["lora fits"]
    with pytest.raises(CourseError, match="no GPU 'tpu'"):
        memory.table("tpu")


@pytest.mark.parametrize("method", memory.METHODS)
@pytest.mark.parametrize("optimizer", memory.OPTIMIZERS)
def test_the_counted_parts_are_what_the_tensors_have(tiny_model, tmp_path, method, optimizer):
    import torch
    from bitsandbytes.optim import AdamW8bit
    from peft import LoraConfig, get_peft_model

    from course_lib import models

    model = tiny_model(dtype=torch.float32 if method == "full" else torch.bfloat16)
    s = tiny_shape(model.config)
    if method == "qlora":
        model.save_pretrained(tmp_path)
        model = models.load(tmp_path, dtype=torch.bfloat16, device="cpu", four_bit="bitsandbytes")
    if method != "full":
        config = LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    made = AdamW8bit(trained) if optimizer == "adamw_8bit" else torch.optim.AdamW(trained)
    made.step()
    found = memory.held(model, made)
    planned = memory.plan(s, method, rank=64, optimizer=optimizer, adapter_bytes=trained[0].element_size())
    assert found.parameters == pytest.approx(planned.parameters, rel=0.001)
    assert found.gradients == pytest.approx(planned.gradients, rel=0.001)
    assert found.optimizer == pytest.approx(planned.optimizer, rel=0.05, abs=5000)  # tables of the 8-bit codes
    assert found.buffers == pytest.approx(planned.buffers, rel=0.05, abs=200)
