"""Checks that turn a silent failure into an error. Each error says what was found and what to do."""

from __future__ import annotations

from course_lib import CourseError


class GuardError(CourseError):
    """Something that would have gone wrong without an error."""


# --- weights in four bits --------------------------------------------------------------------------------------------


def keep_unpacked(model) -> int:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU; returns the number of layers that were told so.

    On a processor with AVX512-BF16, bitsandbytes 0.50 rewrites the weights of a 4-bit layer at its first forward pass
    in eval mode, for a product that is quick and has no backward pass. Whoever trains afterwards loses the gradient
    that should flow through the layer, without an error. `models.load` calls this for every model.
    """
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def repacked(model) -> list[str]:
    """Names of the layers whose 4-bit weights were repacked."""
    layers = ((name, m) for name, m in model.named_modules() if hasattr(m, "support_avx512bf16_for_cpu"))
    states = ((name, getattr(layer.weight, "quant_state", None)) for name, layer in layers)
    return [name for name, state in states if getattr(state, "packing_format_for_cpu", False)]


def require_unpacked(model) -> None:
    """GuardError where a layer's 4-bit weights were repacked, so that training would lose gradients."""
    if found := repacked(model):
        raise GuardError(
            f"{len(found)} layers hold 4-bit weights that were repacked for inference (the first is {found[0]}): no "
            "gradient passes through them. Load the model again and call guards.keep_unpacked(model) before the first "
            "forward pass, or use models.load(four_bit=True), which does."
        )


def require_gradients(model) -> None:
    """GuardError where, after a backward pass, a trainable weight has no gradient, or one that is not finite."""
    import torch

    trained = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise GuardError("nothing is trainable: every weight is frozen. Was the adapter loaded with is_trainable=True?")
    if missing := [name for name, grad in trained if grad is None]:
        raise GuardError(
            f"{len(missing)} of {len(trained)} trainable weights got no gradient (the first is {missing[0]}): what "
            "lies between them and the loss does not pass it on."
        )
    if broken := [name for name, grad in trained if not torch.isfinite(grad).all()]:
        raise GuardError(f"the gradient of {broken[0]} is not finite: lower the learning rate, or leave float16.")


def require_full_weights(model) -> None:
    """GuardError where a layer holds 4-bit weights: an adapter that is merged into them is rounded to four bits."""
    found = [name for name, p in model.named_parameters() if getattr(p, "quant_state", None) is not None]
    if found:
        raise GuardError(
            f"{len(found)} weights are held in four bits (the first is {found[0]}). Merging into them would round the "
            "adapter to four bits too: load the base in 16 bits, or dequantise it, and merge into that."
        )
