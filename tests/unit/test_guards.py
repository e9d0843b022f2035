import warnings

import pytest
import torch

from course_lib import guards, models


@pytest.fixture
def four_bit(tiny_model, tmp_path):
    """A function: the tiny model in four bits with a LoRA adapter whose B is not zero."""
    from peft import LoraConfig, get_peft_model

    tiny_model().save_pretrained(tmp_path / "tiny")

    def build():
        model = models.load(tmp_path / "tiny", dtype=torch.float32, device="cpu", four_bit="bitsandbytes")
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    return build


IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 2]])


def answer_once(model):
    with torch.no_grad():
        model.eval()(IDS)


def gradients(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def allow_repacking(model):
    from bitsandbytes.functional import has_avx512bf16

    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = bool(has_avx512bf16())
    return bool(has_avx512bf16())


def test_a_loaded_model_is_not_repacked_and_keeps_its_gradients(four_bit):
    fresh, used = four_bit(), four_bit()
    answer_once(used)
    assert guards.repacked(used) == []
    guards.require_unpacked(used)
    wanted, found = gradients(fresh), gradients(used)
    guards.require_gradients(used)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def test_the_trap_itself(four_bit):
    """Without the guard the gradients are others; if this fails, bitsandbytes has mended it: say so in lesson 05."""
    model, wanted = four_bit(), gradients(four_bit())
    if not allow_repacking(model):
        pytest.skip("this processor does not repack 4-bit weights (no AVX512-BF16)")
    answer_once(model)
    assert len(guards.repacked(model)) == 14
    with pytest.raises(guards.GuardError, match="14 layers hold 4-bit weights that were repacked"):
        guards.require_unpacked(model)
    found = gradients(model)
    off = [found[n] is None or (found[n] - wanted[n]).norm() > 0.01 * wanted[n].norm() for n in wanted]
    assert any(off)


def test_the_number_of_layers_that_are_told(four_bit):
    assert guards.keep_unpacked(four_bit()) == 14
    assert guards.keep_unpacked(torch.nn.Linear(2, 2)) == 0


def test_gradients_are_required():
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(guards.GuardError, match="4 of 4 trainable weights got no gradient"):
        guards.require_gradients(layer)
    layer(torch.ones(1, 2)).sum().backward()
    guards.require_gradients(layer)
    layer[1].bias.grad[0] = float("nan")
    with pytest.raises(guards.GuardError, match="gradient of 1.bias is not finite"):
        guards.require_gradients(layer)
    with pytest.raises(guards.GuardError, match="nothing is trainable"):
        guards.require_gradients(layer.requires_grad_(False))


def test_merging_into_four_bits_is_refused(four_bit, tiny_lora):
    with pytest.raises(guards.GuardError, match="14 weights are held in four bits.*dequantise"):
        guards.require_full_weights(four_bit())
    guards.require_full_weights(tiny_lora())
