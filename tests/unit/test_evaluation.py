import functools
import math

import numpy as np
import pytest

from course_lib import evaluation

TEXTS = ["Hi", "Where is my order K-8441?", "a", "Two lamps, please, by Friday, and an invoice.", "Träume 3 äöü", "Hi"]


def prompts(system="Turn the message into a record."):
    """Of different lengths, with a shared prefix of more than 16 tokens unless `system` is None."""
    head = [{"role": "system", "content": system}] if system else []
    rows = [[*head, {"role": "user", "content": text}] for text in TEXTS]
    return rows if system else [[{"role": f"{i}user", "content": row[0]["content"]}] for i, row in enumerate(rows)]


def ids_of(tokenizer, prompt):
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def plainly(model, tokenizer, prompt, n, **options):
    """transformers alone: one prompt, its own cache, its own attention."""
    import torch

    ids = torch.tensor([ids_of(tokenizer, prompt)])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0, **options
        )
    return out[0, ids.shape[1] :].tolist()


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["Turn the message into a record.", None], ids=["shared prefix", "nothing shared"])
def test_batches_equal_one_by_one_and_transformers_alone(tiny_model, tiny_tokenizer, system):
    model, asked = tiny_model(), prompts(system)
    rows = [ids_of(tiny_tokenizer, p) for p in asked]
    assert (evaluation._shared(rows) >= 16) == bool(system)
    together = evaluation.generate(model, tiny_tokenizer, asked, max_new_tokens=24)
    small = evaluation.generate(model, tiny_tokenizer, asked, max_new_tokens=24, batch_size=4)
    alone = [evaluation.generate(model, tiny_tokenizer, [p], max_new_tokens=24)[0] for p in asked]
    assert together == alone == small
    assert [a.prompt_tokens for a in together] == [len(row) for row in rows]  # in the order given
    assert len({a.text for a in together}) > 1  # the model does answer differently
    other = tiny_model(attention="eager")
    for prompt, answer in zip(asked, together, strict=True):
        new = plainly(other, tiny_tokenizer, prompt, 24, eos_token_id=2)
        assert answer.text == tiny_tokenizer.decode(new[: new.index(2)] if 2 in new else new)


def test_adapter_answers_equal_transformers_alone(tiny_model, tiny_lora, tiny_tokenizer):
    model = tiny_lora()
    answers = evaluation.generate(model, tiny_tokenizer, prompts(), max_new_tokens=16)
    assert not any(layer.merged for layer in model.modules() if hasattr(layer, "merged"))
    for prompt, answer in zip(prompts(), answers, strict=True):
        new = plainly(model, tiny_tokenizer, prompt, 16, eos_token_id=2)
        assert answer.text == tiny_tokenizer.decode(new[: new.index(2)] if 2 in new else new)
    base = evaluation.generate(tiny_model(), tiny_tokenizer, prompts(), max_new_tokens=16)
    assert [a.text for a in answers] != [a.text for a in base]  # the adapter matters, or this test would say nothing


def test_the_frozen_output_layer_is_not_copied_for_every_row(tiny_lora, tiny_tokenizer):
    """A matrix product with a slice of the prompts' states would copy frozen weights once a row: gigabytes."""
    model, seen = tiny_lora(), []
    head = model.get_base_model().lm_head
    assert not head.weight.requires_grad
    hook = head.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    evaluation.generate(model, tiny_tokenizer, prompts(), max_new_tokens=4)
    hook.remove()
    assert seen and all(states.is_contiguous() and states.shape[1] == 1 for states in seen)


def forced(step_by_row, token=2):
    """Processors that write `token` at the given new token (from 0) of each row, and never before."""
    import torch

    class Force:
        def __init__(self, n):
            self.step = -1
            self.rows = step_by_row[:n]

        def __call__(self, ids, scores):
            self.step += 1
            scores = scores.clone()
            for row, at in enumerate(self.rows):
                scores[row, token] = math.inf if at == self.step else -math.inf
            return torch.nan_to_num(scores, posinf=1e9, neginf=-1e9)

    return lambda batch: [Force(len(batch))]


def test_end_token_ends_and_the_limit_cuts_off(tiny_model, tiny_tokenizer):
    asked = [prompts()[0]] * 4  # equal lengths: rows keep their order in the batch
    free = evaluation.generate(tiny_model(), tiny_tokenizer, asked[:1], max_new_tokens=9, processors=forced([99]))[0]
    assert not free.finished and free.tokens == 9
    answers = evaluation.generate(
        tiny_model(), tiny_tokenizer, asked, max_new_tokens=9, processors=forced([0, 3, 8, 99])
    )
    assert [(a.finished, a.tokens) for a in answers] == [(True, 1), (True, 4), (True, 9), (False, 9)]
    assert answers[0].text == "" and answers[3] == free
    assert all("<|im_end|>" not in a.text for a in answers)


def test_processors_are_made_for_each_batch(tiny_model, tiny_tokenizer):
    made = []

    def processors(batch):
        made.append(batch)
        return forced([0] * len(batch), token=tiny_tokenizer.convert_tokens_to_ids("Z"))(batch)

    answers = evaluation.generate(
        tiny_model(), tiny_tokenizer, prompts(), max_new_tokens=2, batch_size=4, processors=processors
    )
    assert [len(batch) for batch in made] == [4, 2] and sorted(sum(made, [])) == list(range(6))
    lengths = [[answers[i].prompt_tokens for i in batch] for batch in made]
    assert all(max(a) == a[0] for a in lengths)  # the places are those of the rows: longest first
    assert all(a.text.startswith("Z") and a.text != "ZZ" for a in answers)


def test_sampling_repeats_under_a_seed(tiny_model, tiny_tokenizer):
    import torch

    def sample(seed):
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 2.0, "top_k": 0, "max_new_tokens": 12}
        return evaluation.generate(tiny_model(), tiny_tokenizer, prompts(), **options)

    assert sample(0) == sample(0) != sample(1)


def test_rows_that_end_leave_the_batch_and_the_others_do_not_notice(tiny_model, tiny_tokenizer):
    """Each answer is that of the row alone, and short rows are not waited for."""
    import torch

    model, asked = tiny_model().float(), prompts() * 2
    end = tiny_tokenizer.eos_token_id
    sizes, forward = [], model.forward

    @functools.wraps(forward)  # generation reads its signature
    def counted(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    def often(module, given, out):  # some tokens are followed by the end, so that answers differ in length
        likeliest = out.argmax(-1)
        return out.index_put((*(likeliest % 11 == 0).nonzero(as_tuple=True), torch.tensor(end)), torch.tensor(1e9))

    model.get_output_embeddings().register_forward_hook(often)
    model.forward = counted
    together = evaluation.generate(model, tiny_tokenizer, asked, max_new_tokens=40)
    wide = list(sizes)
    alone = [evaluation.generate(model, tiny_tokenizer, [p], max_new_tokens=40)[0] for p in asked]
    assert together == alone
    lengths = [a.tokens for a in together]
    assert len(set(lengths)) > 3 and max(lengths) > 2 * sorted(lengths)[3], lengths
    assert wide[0] == 12 and wide[-1] < 9 and sum(wide) < 12 * max(lengths)
    assert wide == sorted(wide, reverse=True) and torch.is_tensor(model.lm_head.weight)


def test_drawing_one_token_a_row_follows_the_probabilities():
    import torch
    from scipy import stats

    torch.manual_seed(0)
    scores = torch.tensor([1.0, -1.0, -torch.inf, 2.0, 0.0]).expand(4000, 5)
    for temperature in (0.7, 1.5):
        drawn = evaluation._draw(temperature)(None, scores)
        assert ((drawn == 0).sum(1) == 1).all() and torch.isneginf(drawn[:, 2]).all()
        counts = (drawn == 0).sum(0).numpy()
        wanted = torch.softmax(scores[0].double() / temperature, 0).numpy() * 4000
        kept = wanted > 0
        assert stats.chisquare(counts[kept], wanted[kept]).pvalue > 1e-3


def test_no_prompts_and_training_mode(tiny_model, tiny_tokenizer):
    model = tiny_model()
    assert evaluation.generate(model, tiny_tokenizer, []) == []
    evaluation.generate(model.train(), tiny_tokenizer, prompts()[:1], max_new_tokens=2)
    assert model.training
    evaluation.generate(model.eval(), tiny_tokenizer, prompts()[:1], max_new_tokens=2)
    assert not model.training


def test_a_prompt_beyond_the_context_is_refused_with_numbers(tiny_model, tiny_tokenizer):
    long = [{"role": "user", "content": "x" * 480}]
    n = len(ids_of(tiny_tokenizer, long))
    with pytest.raises(ValueError, match=rf"{n} tokens and {513 - n} new ones .* context of 512"):
        evaluation.generate(tiny_model(), tiny_tokenizer, [prompts()[0], long], max_new_tokens=513 - n)
    assert evaluation.generate(tiny_model(), tiny_tokenizer, [long], max_new_tokens=min(512 - n, 3))


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_merged_gives_the_same_logits_and_the_weights_back(tiny_lora, options):
    import torch

    model = tiny_lora(**options)
    ids = torch.arange(3, 43).reshape(2, 20)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(ids).logits
        with evaluation.merged(model):
            found = model(ids).logits
            changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
        again = model(ids).logits
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert changed, "nothing was merged"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(again, wanted)


@pytest.mark.parametrize("fail", [False, True])
def test_merged_restores_bfloat16_weights_bit_for_bit(tiny_lora, fail):
    import torch

    model = tiny_lora().to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        with evaluation.merged(model):
            if fail:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fail
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer.merged for layer in model.modules() if hasattr(layer, "merged"))


@pytest.mark.parametrize("fail", [False, True])
def test_merged_expands_four_bits_and_puts_them_back(tiny_model, tmp_path, fail):
    import torch
    from peft import LoraConfig, get_peft_model

    from course_lib import models

    tiny_model().save_pretrained(tmp_path)
    model = models.load(tmp_path, dtype=torch.float32, device="cpu", four_bit="bitsandbytes")
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.arange(3, 43).reshape(2, 20)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        wanted = model(ids).logits
        try:
            with evaluation.merged(model):
                found = model(ids).logits
                inside = [m for m in model.modules() if hasattr(m, "quant_state")]
                if fail:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fail
        again = model(ids).logits
    assert not inside, "the products inside are plain ones"
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert torch.equal(again, wanted)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not any(layer.merged for layer in model.modules() if hasattr(layer, "merged"))


def test_merged_leaves_a_model_without_adapter_alone(tiny_model):
    model = tiny_model()
    with evaluation.merged(model) as inside:
        assert inside is model


# --- loss on completions ---------------------------------------------------------------------------------------------

COMPLETIONS = ['{"intent":"buy"}', "", "yes", "a longer completion than the others", "é", "no"]


def by_hand(model, tokenizer, prompt, completion):
    import torch

    head = ids_of(tokenizer, prompt)
    tail = tokenizer(completion, add_special_tokens=False)["input_ids"] + [2]
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([head + tail])).logits[0], dim=-1)
    return -sum(logs[len(head) - 1 + i, token].item() for i, token in enumerate(tail)) / len(tail)


@pytest.mark.parametrize("adapted", [False, True])
def test_completion_nll_is_what_one_computes_by_hand(tiny_model, tiny_lora, tiny_tokenizer, adapted):
    model = tiny_lora() if adapted else tiny_model()
    reference = model if adapted else tiny_model(attention="eager")
    pairs = list(zip(prompts(), COMPLETIONS, strict=True))
    found = evaluation.completion_nll(model, tiny_tokenizer, pairs)
    assert found == pytest.approx([by_hand(reference, tiny_tokenizer, *pair) for pair in pairs], rel=1e-5)
    for batch_size in (1, 4):
        assert evaluation.completion_nll(model, tiny_tokenizer, pairs, batch_size) == pytest.approx(found, rel=1e-5)


def test_completion_nll_of_nothing(tiny_model, tiny_tokenizer):
    assert evaluation.completion_nll(tiny_model(), tiny_tokenizer, []).shape == (0,)


# --- intervals and paired comparison ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),  # Newcombe 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_proportion_has_wilsons_interval(hits, n, low, high):
    found = evaluation.proportion([True] * hits + [False] * (n - hits))
    assert (found.value, found.n) == (hits / n, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [1, 10, 300])
def test_proportion_at_the_ends(n):
    none, every = evaluation.proportion([False] * n), evaluation.proportion([True] * n)
    z2 = 1.959964**2
    assert (none.value, none.low, none.high) == pytest.approx((0, 0, z2 / (n + z2)))
    assert (every.value, every.low, every.high) == pytest.approx((1, n / (n + z2), 1))
    assert 0 <= none.low <= none.high <= 1 and 0 <= every.low <= every.high <= 1


@pytest.mark.parametrize("function", [evaluation.proportion, evaluation.mean])
def test_nothing_has_no_value(function):
    with pytest.raises(ValueError, match="no items"):
        function([])


def test_mean():
    same = evaluation.mean([2.5] * 7)
    assert (same.value, same.low, same.high, same.n) == (2.5, 2.5, 2.5, 7)
    values = np.random.default_rng(1).normal(3, 2, 400)
    found, half = evaluation.mean(values), 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.1 * half)
    assert evaluation.mean(values) == found != evaluation.mean(values, seed=1)
    assert str(evaluation.Estimate(0.5, 0.25, 0.75, 8)) == "0.500 [0.250, 0.750] (n=8)"


def test_paired_difference():
    rng = np.random.default_rng(2)
    easy = rng.normal(0, 5, 200)  # items differ much, systems little: pairing must see through it
    found = evaluation.paired_difference(easy + 0.5 + rng.normal(0, 0.1, 200), easy)
    assert 0.45 < found.low < 0.5 < found.high < 0.55
    shifted = evaluation.paired_difference([1, 0, 1], [0, -1, 0])
    assert (shifted.value, shifted.low, shifted.high, shifted.n) == (1, 1, 1, 3)
    same = evaluation.paired_difference([True, False], [True, False])
    assert (same.value, same.low, same.high) == (0, 0, 0)


@pytest.mark.parametrize("function", [evaluation.paired_difference, evaluation.mcnemar])
def test_unequal_lengths_are_refused_with_both(function):
    with pytest.raises(ValueError, match="3 against 2"):
        function([1, 0, 1], [1, 0])


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1.0), (5, 0, 2 / 32), (1, 9, 22 / 1024), (9, 1, 22 / 1024), (4, 4, 1.0), (0, 12, 2 / 4096)],
)
def test_mcnemar(only_a, only_b, p):
    a = [True] * only_a + [False] * only_b + [True] * 30 + [False] * 7  # agreement does not count
    b = [False] * only_a + [True] * only_b + [True] * 30 + [False] * 7
    assert evaluation.mcnemar(a, b) == pytest.approx(p)


def test_macro_f1():
    classes = ["a", "b"]
    assert evaluation.macro_f1(["a", "b"], ["a", "b"], classes) == 1
    # a: precision 1, recall 1/2; b: precision 1/2, recall 1/2
    assert evaluation.macro_f1(["a", "a", "b", "b"], ["a", "b", "b", None], classes) == pytest.approx(
        (2 / 3 + 1 / 2) / 2
    )
    assert evaluation.macro_f1(["a", "a"], ["a", "nonsense"], classes) == pytest.approx(2 / 3 / 2)
    assert evaluation.macro_f1(["a", "b"], [None, "A"], classes) == 0


def test_macro_f1_sees_through_the_majority_baseline():
    gold = ["question"] * 8 + ["buy", "track"]
    assert sum(g == "question" for g in gold) / len(gold) == 0.8
    assert evaluation.macro_f1(gold, ["question"] * 10, ["question", "buy", "track"]) == pytest.approx(16 / 18 / 3)
