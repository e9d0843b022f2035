"""Exercises: ``check("04.2", answer)`` tells at once whether an answer is right, and never stops a run."""

import inspect
import math
import textwrap

CHECKS = {}  # exercise -> (what is expected, function of the answer)


def register(exercise, expected):
    """Decorator for the check of one exercise.

    expected: a sentence that tells an untouched exercise what to give. The function takes the answer and returns
    (right, message); right is None where the answer is still untouched.
    """

    def add(function):
        if exercise in CHECKS:
            raise ValueError(f"exercise {exercise} has a check already: {CHECKS[exercise][1].__name__}")
        CHECKS[exercise] = (expected, function)
        return function

    return add


def check(exercise, answer=None):
    """Print whether ``answer`` solves ``exercise``; untouched (... or None), print what is expected. Never raises."""
    if exercise not in CHECKS:
        known = ", ".join(name for name in CHECKS if name.split(".")[0] == str(exercise).split(".")[0])
        print(f"There is no exercise {exercise}." + (f" This lesson has {known}." if known else ""))
        return
    expected, function = CHECKS[exercise]
    right, message = None, ""
    if answer is not None and answer is not ...:
        try:
            right, message = function(answer)
        except NotImplementedError:  # the body of a function that the learner has not written yet
            pass
        except (Exception, SystemExit) as error:
            right, message = False, f"the check could not use your answer ({type(error).__name__}: {error}). {expected}"
    if right is None:
        print(f"{exercise}  to do: {message or expected}")
    else:
        print(f"{exercise}  {'right' if right else 'not yet'}: {message or ('well done.' if right else expected)}")


def show_source(function):
    """Show the library's own source of a function or class, so that a lesson explains the code that runs."""
    from IPython.display import Markdown, display

    display(Markdown(f"```python\n{textwrap.dedent(inspect.getsource(function)).rstrip()}\n```"))


# --- lesson 00 -------------------------------------------------------------------------------------------------------


@register("00.1", "Fill in all six fields of the record, by the house rules.")
def _desk_record(answer):
    from course_lib import tickets

    wanted = {
        "intent": ("buy", "what does the customer want to happen now?"),
        "items": ([{"product": "bed sheet", "quantity": 12}], "what this request is about, singular, with its number"),
        "order_id": (None, "the order that this request is about; a new one has no number yet"),
        "due_date": ("2026-03-20", "'next Friday' is the Friday of the week that starts next Monday"),
        "needs_human": (False, "an offer to be rung if something is unclear asks for nobody"),
        "priority": ("urgent", "start at normal; one step for a due date, one for a quantity of ten or more"),
    }
    if set(answer) != set(wanted):
        return False, f"the record has exactly the fields {', '.join(wanted)}."
    if any(value is ... for value in answer.values()):
        return None, "" if all(value is ... for value in answer.values()) else "Some fields still hold dots."
    answer = answer | {"due_date": "2026-03-20"} if answer["due_date"] == "next Friday" else answer
    wrong = [f"{field} ({why})" for field, (value, why) in wanted.items() if answer[field] != value]
    if wrong:
        return False, "look again at " + "; ".join(wrong) + "."
    if error := tickets.parse(tickets.to_json(answer)).error:  # 0 equals False, and is not what the schema wants
        return False, f"the values are right, a type is not ({error})."
    return True, "six fields of six: the desk can use this record."


@register("00.2", "Give the number of tokens of each of the three spellings as whole numbers.")
def _token_counts(answer):
    tokens = {"compact": 45, "blanks": 56, "indented": 71}
    if set(answer) != set(tokens):
        return False, f"the names are {', '.join(tokens)}."
    if any(value is ... or value is None for value in answer.values()):
        return None, ""
    if answer == {"compact": 142, "blanks": 156, "indented": 196}:
        return False, "these are characters: count what the tokenizer returns."
    wrong = [name for name, count in tokens.items() if answer[name] != count]
    if wrong:
        return False, f"look again at {', '.join(wrong)}: is the text spelled as its name says, and nothing around it?"
    return True, "the indented form costs more than half as much again as the compact one, on every single ticket."


# --- lesson 01 -------------------------------------------------------------------------------------------------------


def _untouched(answer, wanted):
    """The names of `wanted` for which a dict holds dots still; ValueError where its names are others."""
    if set(answer) != set(wanted):
        raise ValueError(f"the names are {', '.join(wanted)}")
    return [name for name in wanted if answer[name] is ...]


@register("01.1", "Give the next rung for a, b and c, each by its name in this lesson.")
def _next_rungs(answer):
    wanted = {"a": "retrieval", "b": "grammar", "c": "lora"}
    why = {
        ("a", "lora"): "the pages change every week, and weights would be stale by then",
        ("a", "prompt"): "forty pages in every prompt are paid for on every call",
        ("b", "lora"): "the content is right, so there is nothing to teach",
        ("b", "retry"): "that pays for the answer twice, and the second may break too",
        ("b", "validator"): "it finds the broken answers, which the parser does already, and mends none",
        ("b", "few_shot"): "examples make the form likelier and never sure",
    }
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."
    given = {name: str(rung).strip().lower() for name, rung in answer.items()}
    measured = "that one was measured already: what is left?"
    hints = {"a": "is a fact missing, or a behaviour?", "b": "what makes a broken form impossible?", "c": measured}
    wrong = [f"{n} ({why.get((n, given[n]), hints[n])})" for n in wanted if given[n] != wanted[n]]
    return not wrong, "look again at " + "; ".join(wrong) + "." if wrong else "knowledge, form and behaviour, in turn."


@register("01.2", "Give the dollars for one right answer of each rung as a number, or None where no money buys one.")
def _dollars_for_a_right_answer(answer):
    wanted = {"few_shot": None, "larger_model": 0.30 / 480, "lora": 0.36 / 700}
    slips = (
        (("larger_model", 0.30 / 1000), "only right answers count below the fraction, not all thousand."),
        (("lora", 0.36 / 1000), "only right answers count below the fraction, not all thousand."),
        (("lora", 0.06 / 700), "the training run has to be paid for too."),
        (("larger_model", 3000 * 0.36 / 480), "the price is for an hour, and the times are in seconds."),
        (("lora", (600 * 0.36 + 0.30) / 700), "the price is for an hour, and the times are in seconds."),
    )

    def near(a, b):
        return isinstance(a, int | float) and abs(a - b) <= 0.01 * b

    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."
    for (name, slip), message in slips:
        if near(answer[name], slip):
            return False, f"{name}: {message}"
    if answer["few_shot"] is not None:
        return False, "few_shot: nothing was right, so no sum of money buys a right answer, and no number says that."
    wrong = [name for name in ("larger_model", "lora") if not near(answer[name], wanted[name])]
    if wrong:
        return False, f"look again at {', '.join(wrong)}: all machine time and training, over the right answers."
    return True, "the trained rung is the cheapest for a right answer, its training included."


@register("01.3", 'Give the name of one rung, such as "prompt".')
def _where_the_rule_stops(answer):
    messages = {
        "prompt": "its lower end is zero, and no answer was right.",
        "few_shot": "its value reaches the target, but the lower end of its interval does not.",
        "routing": "its lower end reaches the target, but a right answer costs more than the limit.",
        "lora": "it is the best, but the rule takes the first that is good enough.",
        "larger_model": "the first rung that passes both conditions.",
    }
    name = str(answer).strip().lower()
    return name == "larger_model", messages.get(name, f"{answer!r} is not in the table.")


# --- lesson 02 -------------------------------------------------------------------------------------------------------


@register("02.1", "Give observed and expected agreement and kappa as numbers, and passes as True or False.")
def _agreement_by_hand(answer):
    expected = 0.11**2 + 0.89**2
    wanted = {"observed": 0.90, "expected": expected, "kappa": (0.90 - expected) / (1 - expected)}
    dots = _untouched(answer, [*wanted, "passes"])
    if dots:
        return None, "" if len(dots) == 4 else f"{', '.join(dots)} still to be filled in."
    slips = {
        ("expected", 0.5): "chance is not a coin here: both raters say no far more often than yes.",
        ("expected", 0.06**2 + 0.84**2): "each rater's own share of yes is wanted, not the share that both said.",
        ("expected", 0.11 * 0.11): "both may also say no by chance.",
        ("kappa", 0.80): "that takes chance for a coin.",
        ("kappa", 0.90 - expected): "the gain over chance is divided by the largest gain there could be.",
        ("observed", 90): "as a share, please, not as a count.",
        ("observed", 0.06): "agreement on no is agreement, too.",
        ("observed", 0.84): "agreement on yes is agreement, too.",
    }

    def near(a, b):
        return isinstance(a, int | float) and not isinstance(a, bool) and abs(a - b) <= 0.005 * max(1, abs(b))

    for (name, slip), message in slips.items():
        if near(answer[name], slip):
            return False, f"{name}: {message}"
    wrong = [name for name in wanted if not near(answer[name], wanted[name])]
    if wrong:
        return False, f"look again at {', '.join(wrong)}."
    if answer["passes"] not in (True, False):
        return False, "passes is True or False."
    if answer["passes"]:
        return False, "the numbers are right; is kappa at least 0.70?"
    return True, "nine of ten agree, and half of what chance leaves is missed."


LEAK_CASES = (  # text, test item, whether it leaks
    ("I ordered two desk lamps and one of them does not light up, what now?", "", True),
    ("i ordered two desk lamps, and one of them does not light up - what now", "case and punctuation", True),
    ("I  ordered two desk lamps and one of them does not light up,  what now? Many thanks.", "a closing added", True),
    ("I bought two desk lamps and one of them does not light up, what now?", "one word changed", True),
    ("Hello. I ordered two desk lamps and one of them does not light up, what now? Nobody answers the phone, I have "
     "tried on three days, and the manual says nothing about it. Please write to me about the next steps soon.",
     "inside a longer text", True),
    ("I ordered two desk lamps and both of them work, so you may send the bill.", "a stock phrase is shared", False),
    ("One of them does not work. What now?", "single words are shared", False),
    ("Where is my parcel with the kettle?", "nothing is shared", False),
    ("I ordered", "a short text that is part of the item", False),
)  # fmt: skip


@register("02.2", "Write leaks(text, test_item): True if the text contains the test item, lightly edited or not.")
def _find_the_leak(answer):
    if not callable(answer):
        raise TypeError("a function of a text and a test item is wanted, not its result")
    item = LEAK_CASES[0][0]
    cases = [(text, item, what or "verbatim", leaks) for text, what, leaks in LEAK_CASES]
    cases += [
        ("Refund me, please!", "refund me please", "a test item of three words", True),
        ("Refund the other one.", "refund me please", "one word of a short test item", False),
    ]
    for text, test_item, what, leaks in cases:
        found = answer(text, test_item)
        if found is None or found is ...:
            return None, ""
        if bool(found) != leaks:
            told = "no leak, and yours says it is one" if found else "a leak, and yours does not find it"
            return False, f"{what}: that is {told}."
    return True, f"{len(cases)} of {len(cases)} pairs, edited ones and stock phrases among them."


@register("02.3", "Give the number of general texts for each way of counting.")
def _five_per_cent_of_what(answer):
    wanted = {"examples": 100, "tokens": 200}
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == 2 else f"{dots[0]} still to be filled in."
    slips = {
        ("examples", 95): "that is a twentieth of the tickets; the texts are part of the whole, too.",
        ("tokens", 190): "that is a twentieth of the tickets' tokens; the texts are part of the whole, too.",
        ("tokens", 100): "a text has half the tokens of a ticket, so equally many are not enough.",
        ("tokens", 50): "a text is the shorter one: more of them are needed, not fewer.",
        ("tokens", 13000): "these are tokens; how many texts is that?",
    }
    for (name, slip), message in slips.items():
        if answer[name] == slip:
            return False, f"{name}: {message}"
    wrong = [
        name
        for name, value in wanted.items()
        if not (isinstance(answer[name], int | float) and abs(answer[name] - value) < 0.5)
    ]
    if wrong:
        return False, f"look again at {', '.join(wrong)}: n texts make n / (1900 + n) of the examples."
    return True, "a dose without its unit is off by a factor of two here."


# --- lesson 03 -------------------------------------------------------------------------------------------------------


@register("03.1", "Write labels_of(ids, prompt_length, length): -100 for the prompt and the padding, the ids between.")
def _labels_of_a_row(answer):
    end = 2
    rows = (  # ids, tokens of the prompt, tokens without padding
        ([5, 6, 7, 8, 9, end, end, end], 3, 6),
        ([5, end, 7, 8, end], 2, 5),  # an end token in the prompt, no padding
        ([4, 5, 8, end, end, end, end], 1, 4),
    )
    for ids, prompt_length, length in rows:
        given = answer(list(ids), prompt_length, length)
        given = [int(x) for x in given]  # a tensor or an array will do
        wanted = [i if prompt_length <= t < length else -100 for t, i in enumerate(ids)]
        if given == wanted:
            continue
        if given == wanted[1:] + [-100] or given == wanted[1:]:
            return False, "that is shifted by one already: the loss does the shift, the labels stand where the ids are."
        if len(given) != len(ids):
            return False, f"a row of {len(ids)} ids needs {len(ids)} labels, not {len(given)}."
        if given[length - 1] == -100:
            return False, "the end of the answer is hidden: a model trained so does not learn to stop."
        if any(x != -100 for x in given[length:]):
            return False, "padding is judged: the model would learn to write end tokens for ever."
        if any(x != -100 for x in given[:prompt_length]):
            return False, "the prompt is judged: only the answer should be."
        return False, f"for {ids} with a prompt of {prompt_length} and {length} real tokens: {wanted}."
    return True, "the prompt is read, the answer and its end are judged, padding is neither."


@register("03.2", "Give the loss of the batch of four rows as a number.")
def _loss_of_four_rows(answer):
    value = float(answer)
    if abs(value - 0.725) < 0.005:
        return False, "that is the mean of the four means: it gives a row of ten tokens as much weight as one of sixty."
    if abs(value - 44.0) < 0.5:
        return False, "that is the sum over all tokens: divide by how many there are."
    if abs(value - 2.9) < 0.05:
        return False, "that is the sum of the means."
    return abs(value - 0.44) < 0.0051, "every judged token counts once." if abs(value - 0.44) < 0.0051 else ""


@register("03.3", 'Give two steps: "ends", after which training ends, and "kept", whose weights are kept.')
def _early_stop(answer):
    wanted = {"ends": 400, "kept": 400}
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."
    slips = {
        ("ends", 8): "these are evaluations: give steps.",
        ("kept", 8): "these are evaluations: give steps.",
        ("ends", 300): "the counter starts again when an evaluation beats the best by more than the threshold.",
        ("ends", 350): "patience is 3: the third evaluation in a row that is not better by enough ends it.",
        ("ends", 450): "without the threshold every one of them is an improvement; with it, most are not.",
        ("kept", 250): "the lowest loss so far is kept, even if it was lower by less than the threshold.",
        ("kept", 450): "that evaluation is never made.",
    }
    wrong = [f"{n}: {slips.get((n, answer[n]), 'count again.')}" for n in wanted if answer[n] != wanted[n]]
    return not wrong, " ".join(wrong) or "it ended one evaluation before the loss fell further: patience is a bet."


@register("03.4", "Give one diagnosis for each of the four runs.")
def _read_the_curves(answer):
    wanted = {"a": "weights frozen", "b": "rate too high", "c": "too many epochs", "d": "healthy"}
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."
    given = {name: " ".join(str(word).lower().split()) for name, word in answer.items()}
    hints = {
        "a": "is the held-out loss only nearly the same, or the same?",
        "b": "what happened between the first and the second number?",
        "c": "compare the last two numbers of both losses.",
        "d": "do both losses fall, and do they stay together?",
    }
    unknown = [word for word in given.values() if word not in wanted.values()]
    if unknown:
        return False, f"{unknown[0]!r} is none of the four: {', '.join(wanted.values())}."
    wrong = [f"{name} ({hints[name]})" for name in wanted if given[name] != wanted[name]]
    return not wrong, "look again at " + "; ".join(wrong) + "." if wrong else "two losses and a norm tell most of it."


# --- lesson 04 -------------------------------------------------------------------------------------------------------


@register("04.1", "Write adapter_parameters(targets, r, dora=False), which returns a whole number.")
def _adapter_parameters(answer):
    width, kv, inner, blocks = 2048, 512, 8192, 24
    shapes = {"q_proj": (width, width), "k_proj": (width, kv), "v_proj": (width, kv), "o_proj": (width, width)}
    shapes |= {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}

    def count(targets, r, dora, shapes=shapes, blocks=blocks, axis=1):
        return blocks * sum(r * sum(shapes[t]) + dora * shapes[t][axis] for t in targets)

    no_groups = shapes | {"k_proj": (width, width), "v_proj": (width, width)}
    cases = [(["q_proj"], 8, False), (["q_proj", "v_proj"], 16, False), (list(shapes), 16, False)]
    cases += [(["down_proj"], 4, False), (["k_proj", "up_proj"], 4, True), (list(shapes), 16, True)]
    for targets, r, dora in cases:
        found, case = answer(targets, r, dora=dora), f"{', '.join(targets)}, rank {r}, dora={dora}"
        if found == count(targets, r, dora):
            continue
        slips = (
            (count(targets, r, dora, blocks=1), "this is one block; the model has 24."),
            (count(targets, r, dora, shapes=no_groups), "keys and values have a width of 512 here, not of 2048."),
            (count(targets, r, dora, axis=0), "DoRA's length belongs to a row, and a row makes one output."),
            (count(targets, r, False), "DoRA's lengths are missing."),
            (
                blocks * sum(r * math.prod(shapes[t]) for t in targets),
                "the thin matrices' sizes are added, not multiplied.",
            ),
            (blocks * sum(math.prod(shapes[t]) for t in targets), "this is the frozen matrix itself."),
        )
        hint = next((text for slip, text in slips if found == slip), f"{found!r} is not the count.")
        return False, f"{case}: {hint}"
    return True, "six counts of six, and no model was loaded."


@register("04.2", "Write row_lengths(W, A, B, s), which returns one length for each row of W.")
def _row_lengths(answer):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    generator = torch.Generator().manual_seed(4)
    W, A, B = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((48, 80), (4, 80), (48, 4)))
    large = []

    class Watch(TorchDispatchMode):
        """Notes every new tensor of W's size; views of W itself, such as its transpose, are none."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for made in out if isinstance(out, tuple | list) else (out,):
                if isinstance(made, torch.Tensor) and made.numel() >= W.numel():
                    if made.untyped_storage().data_ptr() != W.untyped_storage().data_ptr():
                        large.append(f"{function.__name__.split('.')[0]} {tuple(made.shape)}")
            return out

    for s in (2.0, 0.5):
        with Watch():
            found = answer(W, A, B, s)
        found, wanted = torch.as_tensor(found).detach().double(), (W + s * B @ A).norm(dim=1)
        if found.shape != wanted.shape:
            return False, f"a row has one length: {tuple(wanted.shape)} is wanted, not {tuple(found.shape)}."
        if torch.allclose(found, wanted, rtol=1e-5):
            continue
        base, cross, square = W.norm(dim=1) ** 2, ((W @ A.T) * B).sum(1), ((B @ (A @ A.T)) * B).sum(1)
        slips = (
            (base + 2 * s * cross + s**2 * square, "this is the square: take its root."),
            ((base + s**2 * square).sqrt(), "the term in the middle is missing: W and B A are not at right angles."),
            ((base + s * cross + s**2 * square).sqrt(), "the term in the middle counts twice."),
            ((base + 2 * s * cross + s * square).sqrt(), "the scale is squared in the last term."),
            (base.sqrt(), "these are the lengths of W alone."),
        )
        hint = next((text for slip, text in slips if torch.allclose(found, slip, rtol=1e-5)), "the values are others.")
        return False, hint
    if large:
        return False, f"the values are right, and a matrix as large as W was made on the way ({large[0]})."
    return True, "the same lengths, and nothing larger than B on the way."


@register("04.3", 'Give for each of a to d: "better", "worse", "no large difference" or "cannot tell".')
def _read_the_intervals(answer):
    wanted = {"a": "better", "b": "cannot tell", "c": "no large difference", "d": "worse"}
    hints = {
        "a": "zero is outside, and both ends are on the same side",
        "b": "zero is inside, and the ends are far from it",
        "c": "zero is inside, and both ends are nearer than two points",
        "d": "zero is outside: which side?",
    }
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."
    given = {name: " ".join(str(word).lower().split()) for name, word in answer.items()}
    wrong = [f"{name} ({hints[name]})" for name in wanted if given[name] != wanted[name]]
    return not wrong, "look again at " + "; ".join(
        wrong
    ) + "." if wrong else "the largest value of the four says least."


# --- lesson 05 -------------------------------------------------------------------------------------------------------


@register("05.1", "Write bits(block, group=None), which returns the bits of one weight, scales included.")
def _bits_of_a_weight(answer):
    def count(block, group):
        return 4 + (32 if group is None else 8 + 32 / group) / block

    for block, group in ((64, None), (32, None), (64, 256), (32, 256), (128, 64)):
        found, case = float(answer(block, group) if group else answer(block)), f"blocks of {block}, groups of {group}"
        wanted, slips = count(block, group), []
        if abs(found - wanted) < 1e-6:
            continue
        if group:
            slips = [
                (4 + 8 / block, "the second scale is missing: each group has one float32."),
                (4 + 8 / block + 32 / group, "a group is a group of scales, not of weights: it holds block * group."),
                (4 + (8 + 32) / block, "the second scale is shared by a whole group of scales."),
                (4 + 32 / block, "with a group the first scale has eight bits."),
            ]
        slips += [(wanted / 8, "these are bytes."), (wanted - 4, "the codes themselves have four bits.")]
        slips += [(4 + 16 / block, "a float32 has 32 bits.")]
        hint = next((text for slip, text in slips if abs(found - slip) < 1e-6), f"{found:g} is not the count.")
        return False, f"{case}: {hint}"
    return True, f"with QLoRA's sizes {count(64, 256):.3f} bits, and no tensor was made."


@register("05.2", 'Give one change for each: "checkpointing", "four bits", "an adapter" or "8-bit optimizer".')
def _what_would_make_it_fit(answer):
    wanted = {"a": "checkpointing", "b": "four bits", "c": "an adapter"}
    why = {
        ("a", "four bits"): "the frozen weights are not what fills the card there",
        ("a", "8-bit optimizer"): "an adapter's optimizer is small change",
        ("b", "checkpointing"): "it is on already: the frozen weights alone are more than the card has",
        ("b", "8-bit optimizer"): "the frozen weights alone are more than the card has",
        ("c", "8-bit optimizer"): "it takes away most of the largest part, and what is left is still too much",
        ("c", "four bits"): "a weight that is trained cannot be a code of four bits",
        ("c", "checkpointing"): "it is on already, and the activations are the smallest part",
    }
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."
    given = {name: " ".join(str(word).lower().split()) for name, word in answer.items()}
    known = (*wanted.values(), "8-bit optimizer")
    if unknown := [word for word in given.values() if word not in known]:
        return False, f"{unknown[0]!r} is none of the four: {', '.join(known)}."
    wrong = [f"{n} ({why.get((n, given[n]), 'an adapter is there already')})" for n in wanted if given[n] != wanted[n]]
    if wrong:
        return False, "look again at " + "; ".join(wrong) + "."
    return True, "each change acts on one part of the bill."


@register("05.3", "Write merged_weight(packed, state, A, B, alpha, r), which returns the merged matrix in float32.")
def _merged_weight(answer):
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    generator = torch.Generator().manual_seed(5)
    W, A, B = (torch.randn(*shape, generator=generator) for shape in ((128, 192), (8, 192), (128, 8)))
    B = B / 20

    def off(found, wanted):
        return ((found - wanted).norm() / wanted.norm()).item()

    for double, alpha in ((False, 16), (True, 24)):
        packed, state = quantize_4bit(W, quant_type="nf4", compress_statistics=double)
        found = torch.as_tensor(answer(packed, state, A, B, alpha, 8)).detach()
        if tuple(found.shape) != tuple(W.shape):
            return False, f"the merged matrix is {tuple(W.shape)}, yours is {tuple(found.shape)}."
        frozen, update = dequantize_4bit(packed, state), B @ A
        wanted = frozen + alpha / 8 * update
        again = dequantize_4bit(*quantize_4bit(wanted, quant_type="nf4", compress_statistics=double))
        kind, found = found.dtype, found.float()
        if off(found, wanted) < 1e-5:
            continue
        slips = (
            (frozen + update, 1e-5, "alpha / r is missing."),
            (frozen + alpha * update, 1e-5, "the scale is alpha / r, not alpha."),
            (frozen + 8 / alpha * update, 1e-5, "the scale is alpha / r, not r / alpha."),
            (frozen, 1e-5, "that is the frozen weight without the update."),
            (alpha / 8 * update, 1e-5, "that is the update alone."),
            (W + alpha / 8 * update, 1e-5, "that is the original weight: the adapter was trained on the rounded one."),
            (again, 1e-3, "that was rounded to four bits again, and most of the update with it."),
            (wanted, 1e-2, f"right, but rounded to {str(kind).removeprefix('torch.')}: float32, please."),
        )
        hint = next((text for slip, near, text in slips if off(found, slip) < near), "the values are others.")
        return False, hint
    return True, "expanded, added, and not rounded to four bits again."


# --- lesson 06 -------------------------------------------------------------------------------------------------------


@register(
    "06.1", "Write smoothed_dpo(chosen, rejected, ref_chosen, ref_rejected, beta, eps), which returns one number."
)
def _smoothed_dpo(answer):
    import torch

    generator = torch.Generator().manual_seed(6)
    ours, theirs = torch.randn(2, 5, generator=generator) * 8 - 40, torch.randn(2, 5, generator=generator) * 8 - 40
    logsigmoid = torch.nn.functional.logsigmoid

    def smoothed(margin, eps):
        return (-(1 - eps) * logsigmoid(margin) - eps * logsigmoid(-margin)).mean()

    for beta, eps, factor in ((0.1, 0.0, 1), (0.3, 0.1, 1), (0.5, 0.2, 40)):
        four = [*(ours * factor), *(theirs * factor)]
        found = torch.as_tensor(answer(*four, beta, eps)).detach().float()
        if found.numel() != 1:
            return False, f"one number is wanted, the mean over the pairs, not {tuple(found.shape)}."
        margin = (four[0] - four[2]) - (four[1] - four[3])
        wanted = smoothed(beta * margin, eps)
        if torch.allclose(found, wanted, rtol=1e-4, atol=1e-5):
            continue
        if not torch.isfinite(found):
            return False, "a large margin gives no finite number: use torch.nn.functional.logsigmoid."
        no_reference = four[0] - four[1]
        slips = (
            (smoothed(-beta * margin, eps), "chosen and rejected are mixed up: the sign of the margin is turned."),
            (smoothed(beta * no_reference, eps), "the reference is missing."),
            (smoothed(margin, eps), "beta is missing."),
            (smoothed(beta * margin, 0), "the smoothing is missing."),
            (smoothed(beta * margin, 1 - eps), "the two shares are the wrong way round."),
            (-wanted, "a loss is to be made small: the sign of the whole is turned."),
            (wanted * margin.numel(), "the mean over the pairs is wanted, not the sum."),
        )
        hint = next((text for slip, text in slips if torch.allclose(found, slip, rtol=1e-4, atol=1e-5)), None)
        return False, hint or f"beta {beta}, eps {eps}: {found.item():.4f} instead of {wanted.item():.4f}."
    return True, "finite at large margins, too."


@register("06.2", "Write best_policy(log_ref, reward, beta), which returns log-probabilities.")
def _best_policy(answer):
    import numpy as np

    rng = np.random.default_rng(6)
    for beta, size, scale in ((0.5, 4, 1.0), (2.0, 7, 3.0), (0.01, 5, 1000.0)):
        ref, reward = np.log(rng.dirichlet(np.ones(size))), rng.normal(size=size) * scale

        def normal(scores):
            return scores - np.logaddexp.reduce(scores)

        wanted = normal(ref + reward / beta)
        found = np.asarray(answer(ref.copy(), reward.copy(), beta), dtype=float)
        if found.shape != wanted.shape:
            return False, f"one log-probability for each answer is wanted: {wanted.shape}, not {found.shape}."
        if np.allclose(found, wanted, rtol=1e-6, atol=1e-8):
            continue
        if np.isnan(found).any() or np.isinf(found).any():
            return (
                False,
                f"rewards of {scale:.0f} and beta {beta} give no finite numbers: stay with logarithms throughout.",
            )
        slips = (
            (np.exp(wanted), "these are the probabilities: their logarithms are wanted."),
            (ref + reward / beta, "they do not sum to one: normalise at the end."),
            (normal(reward / beta), "the reference is missing."),
            (normal(ref + reward * beta), "the reward is divided by beta, not multiplied."),
            (normal(np.exp(ref) + reward / beta), "the reference comes in as a logarithm already."),
        )
        hint = next((text for slip, text in slips if np.allclose(found, slip, rtol=1e-6, atol=1e-8)), None)
        return False, hint or f"the values are others, with beta {beta}."
    return True, "a softmax with the reference as its prior, and finite for large rewards."


@register("06.3", "Give a list of words or phrases, in lower case, of at most three words each.")
def _close_the_holes(answer):
    import json
    import re

    from course_lib import tickets

    holes = (
        "you have my word that this ends well.",
        "expect a replacement in the post.",
        "it costs you nothing.",
        "the driver dropped it.",
        "you can count on a new one.",
    )
    marks = [answer] if isinstance(answer, str) else list(answer)
    if not marks or not all(isinstance(mark, str) and mark.strip() for mark in marks):
        return False, "a list of words or phrases is wanted, none of them empty."
    marks = [" ".join(mark.lower().split()) for mark in marks]
    if long := [mark for mark in marks if len(mark.split()) > 3]:
        return False, f"{long[0]!r} has more than three words."

    def caught(text):
        text = " ".join(text.lower().split())
        return [mark for mark in marks if re.search(rf"(?<!\w){re.escape(mark.rstrip('.'))}(?!\w)", text)]

    if missed := [hole for hole in holes if not caught(hole)]:
        return False, f"{len(missed)} still slip through, such as {missed[0]!r}."
    lines = (tickets.DATA / "replies" / "drafts.jsonl").read_text(encoding="utf-8").splitlines()
    hit = [(mark, draft) for draft in (json.loads(line)["reply"] for line in lines) for mark in caught(draft)]
    if hit:
        return False, f"{hit[0][0]!r} stands in {len(hit)} honest drafts, such as: {' '.join(hit[0][1].split())}"
    return True, "all five are caught, and no draft. There is always a sixth sentence."


# --- lesson 07 -------------------------------------------------------------------------------------------------------


@register("07.1", "Write z0(table), which returns the reference point of a batch as TRL estimates it.")
def _reference_point(answer):
    tables = (
        [[9.0, 0.5, 2.5], [-1.0, 8.0, 0.75], [4.0, 3.5, 7.0]],
        [[5.0, 1.0, -4.0], [-2.0, 5.0, 2.0], [1.5, 0.5, 5.0]],
        [[1.0, 0.25], [0.5, 1.0]],
        [[0.1 * ((3 * i + 7 * j * j) % 11) - 0.2 for j in range(5)] for i in range(5)],
    )

    def pairs(table, step=-1):
        return [row[(i + step) % len(table)] for i, row in enumerate(table)]

    def off(table):
        return [value for i, row in enumerate(table) for j, value in enumerate(row) if i != j]

    def mean(values):
        return sum(values) / len(values)

    def same(formula):
        return all(math.isclose(a, formula(t), abs_tol=1e-6) for a, t in zip(found, tables, strict=True))

    found = [float(answer([list(row) for row in table])) for table in tables]
    slips = (
        (lambda t: mean(pairs(t)), "a reference point is never below zero: clamp it."),
        (lambda t: mean([max(0.0, v) for v in pairs(t)]), "the mean comes first, the clamp afterwards."),
        (lambda t: max(0.0, mean(pairs(t, 0))), "that is the diagonal, where each reply stands with its own ticket."),
        (lambda t: mean(pairs(t, 0)), "that is the diagonal, where each reply stands with its own ticket."),
        (
            lambda t: max(0.0, mean(pairs(t, 1))),
            "each ticket gets the reply of the next one, as in the paper; TRL moves the replies the other way.",
        ),
        (lambda t: max(0.0, mean(off(t))), "each ticket gets one foreign reply, not all of them."),
        (lambda t: max(0.0, sum(pairs(t))), "a sum grows with the batch: take the mean."),
    )
    if same(lambda t: max(0.0, mean(pairs(t)))):
        return True, "one foreign reply for each ticket, the mean, and never below zero."
    return False, next((text for slip, text in slips if same(slip)), "the values are others: replies move on by one.")


@register("07.2", 'Give for each desk the least and the greatest weight of a thumb up, or "cannot train".')
def _weights_of_a_thumb_up(answer):
    wanted = {"a": (1.0, 4 / 3), "b": (5.0, 20 / 3), "c": "cannot train"}
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."

    def near(given, pair):
        return len(given) == 2 and all(abs(x - y) <= 0.01 * abs(y) for x, y in zip(given, pair, strict=True))

    def wrong(name):
        given = answer[name]
        words = " ".join(given.lower().split()) if isinstance(given, str) else None
        if name == "c":
            return None if words == wanted["c"] else "nobody says what a bad reply is, and no weight makes up for that"
        if words is not None:
            return "both kinds of thumbs are there, so a weight can balance them"
        low, high = wanted[name]
        slips = (
            ((3 / 4 / low, 1 / low), "that is the weight of a thumb down where a thumb up counts 1"),
            ((3 / 4 * low, low), "4/3 is the upper end for the good side, not the lower one"),
            ((1 / low, 4 / 3 / low), "the rarer thumb needs the larger weight"),
            ((low, 1.5 * low), "that is the later version's 3/2; the rule above ends at 4/3"),
            ((high, low), "the least comes first"),
        )
        given = [float(x) for x in given]
        if near(given, wanted[name]):
            return None
        return next((text for slip, text in slips if near(given, slip)), "put the counts into the rule")

    found = {name: text for name in wanted if (text := wrong(name))}
    if found:
        return False, "look again at " + "; ".join(f"{name} ({text})" for name, text in found.items()) + "."
    return True, "balance where it can be had, and no training where it cannot."


@register("07.3", "Give for each run what its log shows, in the words of the list.")
def _four_logs(answer):
    wanted = {
        "a": "healthy",
        "b": "rows in order of their label",
        "c": "sign not turned",
        "d": "nothing learns",
    }
    hints = {
        "a": "both rewards go their own way, and a reference point at zero is no fault",
        "b": "what kind of thumb is in the batches of each half?",
        "c": "which way do the rewards of thumbs down go?",
        "d": "does anything move at all?",
    }
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."
    given = {name: " ".join(str(word).lower().split()) for name, word in answer.items()}
    wrong = [f"{name} ({hints[name]})" for name in wanted if given[name] != wanted[name]]
    if wrong:
        return False, "look again at " + "; ".join(wrong) + "."
    return True, "the rewards of thumbs down are the first thing to look at in such a log."


# --- lesson 08 -------------------------------------------------------------------------------------------------------


@register("08.1", "Write kd(student, teacher, T), which returns Hinton's loss for one token.")
def _hintons_loss(answer):
    cases = (
        ([0.0, 1.0, -2.0], [3.0, 0.5, -1.0], 1.0),
        ([0.5, 0.25, 2.0, -1.0], [2.0, 1.5, -3.0, 0.0], 2.0),
        ([4.0, -4.0], [-1.0, 2.0], 4.0),
        ([1500.0, 1499.0, 0.0], [1498.0, 1500.0, 0.0], 1.5),
    )

    def log_p(logits, T):
        top = max(logits) / T
        total = math.log(sum(math.exp(x / T - top) for x in logits))
        return [x / T - top - total for x in logits]

    def kl(p, q):
        return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))

    def right(s, t, T):
        return kl(log_p(t, T), log_p(s, T)) * T * T

    def same(formula):
        return all(math.isclose(a, formula(*case), rel_tol=1e-3, abs_tol=1e-5)
                   for a, case in zip(found, cases, strict=True))  # fmt: skip

    found = [float(answer(list(s), list(t), T)) for s, t, T in cases]
    if not all(map(math.isfinite, found)):
        return False, "large logits give no number: subtract the largest one first, or use log_softmax."
    slips = (
        (lambda s, t, T: right(s, t, T) / T**2, "the factor that keeps the gradient's size is missing."),
        (lambda s, t, T: right(s, t, T) / T, "the gradient shrinks with T squared, not with T."),
        (lambda s, t, T: right(t, s, T), "that is the other direction: the teacher's probabilities weigh."),
        (lambda s, t, T: right(t, s, T) / T**2, "that is the other direction, and the factor is missing."),
        (lambda s, t, T: kl(log_p(t, 1), log_p(s, T)) * T * T, "the teacher is softened too."),
        (lambda s, t, T: kl(log_p(t, T), log_p(s, 1)) * T * T, "the student is softened too."),
        (lambda s, t, T: -right(s, t, T), "a divergence is never negative: turn the sign."),
    )
    if same(right):
        return True, "forward KL, both sides softened, and the factor at the end."
    return False, next((text for slip, text in slips if same(slip)), "the values are others.")


@register("08.2", 'Give for each offer a number in its unit, or "never".')
def _three_bills(answer):
    wanted = {"a": 2000.0, "b": 1_000_000.0, "c": "never"}
    slips = {
        "a": (
            (2e9, "millions of tokens are asked for"),
            (6000 / 3.2, "the student costs something too"),
            (6000 / 3.4, "the prices are subtracted"),
        ),
        "b": (
            (2000.0, "that is the answer to a"),
            (1.0, "requests are asked for, not millions of them"),
            (2e9, "those are tokens: a request has 2,000 of them"),
            (4e6, "a request has 2,000 tokens: divide"),
        ),
        "c": (),
    }
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."

    def wrong(name):
        given = answer[name]
        word = " ".join(given.lower().split()) if isinstance(given, str) else None
        if name == "c":
            return None if word == "never" else "what does a month cost with the teacher, and with the machine?"
        if word is not None:
            return "the student is cheaper by the token, so there is such a volume"
        near = [text for value, text in slips[name] if math.isclose(float(given), value, rel_tol=5e-3)]
        if math.isclose(float(given), wanted[name], rel_tol=5e-3):
            return None
        return near[0] if near else "what was paid once, over what is saved"

    found = {name: text for name in wanted if (text := wrong(name))}
    if found:
        return False, "look again at " + "; ".join(f"{name} ({text})" for name, text in found.items()) + "."
    return True, "a volume has a unit, and some volumes do not exist."


@register("08.3", "Give for each desk one of the five words of the list.")
def _which_method(answer):
    wanted = {"a": "sequence kd", "b": "logit kd", "c": "gold labels", "d": "on-policy kd", "e": "no student"}
    hints = {
        "a": "what does this interface hand out?",
        "b": "what do the weights give beyond a text?",
        "c": "which of the two is right more often?",
        "d": "whose texts must the student see?",
        "e": "what does the teacher's bill come to in a month?",
    }
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."
    given = {name: " ".join(str(word).lower().split()) for name, word in answer.items()}
    wrong = [f"{name} ({hints[name]})" for name in wanted if given[name] != wanted[name]]
    if wrong:
        return False, "look again at " + "; ".join(wrong) + "."
    return True, "what is at hand decides, and what it costs."


# --- lesson 09 -------------------------------------------------------------------------------------------------------


@register(
    "09.1", "Write group_advantages(rewards, size), which returns one advantage for each reward, as TRL computes it."
)
def _group_advantages(answer):
    from statistics import mean, pstdev, stdev

    cases = (
        ([1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1], 6),
        ([0.0, 0.0, 0.0, 0.0], 4),
        ([1.0, 1.0, 0.5, 1.0], 2),
        ([0.001, 0.0, 0.0004, 0.0, 0.3, 0.9], 3),
    )

    def by(formula):
        """The same for each group of each case; a formula gets the group and all rewards."""
        return [
            [a for i in range(0, len(r), n) for a in formula(r[i : i + n], r)] for r, n in cases
        ]  # fmt: skip

    def same(formula):
        try:
            wanted = by(formula)
        except ZeroDivisionError:
            return False
        return all(
            len(a) == len(b) and all(math.isclose(x, y, abs_tol=1e-4) for x, y in zip(a, b, strict=True))
            for a, b in zip(found, wanted, strict=True)
        )

    try:
        found = [[float(a) for a in answer(list(r), n)] for r, n in cases]
    except ZeroDivisionError:
        return False, "a group of equal rewards divides by zero: that is what the small number is for."
    if same(lambda g, r: [(x - mean(g)) / (stdev(g) + 1e-4) for x in g]):
        return True, "above the group, in units of the group; equal rewards give zeros."
    slips = (
        (lambda g, r: [(x - mean(g)) / (pstdev(g) + 1e-4) for x in g], "that deviation divides by n: TRL's by n - 1."),
        (lambda g, r: [(x - mean(g)) / (stdev(g) + 1e-8) for x in g], "the small number is another in TRL."),
        (lambda g, r: [x - mean(g) for x in g], "the division by the group's deviation is missing."),
        (lambda g, r: [(x - mean(r)) / (stdev(r) + 1e-4) for x in g], "each group has its own mean and deviation."),
        (lambda g, r: [(x - mean(g)) / (stdev(r) + 1e-4) for x in g], "the deviation is that of all rewards."),
        (lambda g, r: [x / (stdev(g) + 1e-4) for x in g], "the group's mean is not taken off."),
    )
    return False, next(
        (text for slip, text in slips if same(slip)), "the values are others: mean and deviation of each group."
    )


@register("09.2", "Give for each verifier a string that gets its reward and does not deserve it.")
def _holes_in_verifiers(answer):
    import json

    from course_lib import routing, tickets

    def record_of(text):
        return json.loads(text)["team"] == "orders"

    def honest_record(text):
        try:
            value = json.loads(text, object_pairs_hook=tickets._no_duplicates)
        except KeyError:
            return False
        return value == {"team": "orders"}

    holes = {
        "a": (lambda text: "orders" in text, routing.right_team),
        "b": (lambda text: text.strip() in "orders", routing.right_team),
        "c": (lambda text: text.lower().split()[-1] == "orders", routing.right_team),
        "d": (record_of, lambda text, gold: honest_record(text)),
    }
    dots = _untouched(answer, holes)
    if dots:
        return None, "" if len(dots) == len(holes) else f"{', '.join(dots)} still to be filled in."
    wrong = []
    for name, (verify, deserved) in holes.items():
        text = answer[name]
        if not isinstance(text, str):
            wrong.append(f"{name} (a string is wanted)")
            continue
        try:
            passed = bool(verify(text))
        except Exception as error:
            wrong.append(f"{name} (the verifier raises {type(error).__name__} on it)")
            continue
        if not passed:
            wrong.append(f"{name} (the verifier gives no reward for it)")
        elif deserved(text, "orders"):
            wrong.append(f"{name} (that answer is right, so it deserves the reward)")
    if wrong:
        return False, "look again at " + "; ".join(wrong) + "."
    return True, "four holes, and a model would have found them too."


@register("09.3", "Give for each run what its log shows, in the words of the list.")
def _four_grpo_logs(answer):
    wanted = {
        "a": "healthy",
        "b": "needs a cold start",
        "c": "hacks its reward",
        "d": "collapsed to two classes",
    }
    hints = {
        "a": "reward and honest score rise together, and the model stays undecided enough to try things",
        "b": "which advantages does a group without a mixture have?",
        "c": "do reward and honest score agree?",
        "d": "what share is right if two of five classes are answered?",
    }
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."
    given = {name: " ".join(str(word).lower().split()) for name, word in answer.items()}
    wrong = [f"{name} ({hints[name]})" for name in wanted if given[name] != wanted[name]]
    if wrong:
        return False, "look again at " + "; ".join(wrong) + "."
    return True, "the reward alone would have told two of them apart."


# --- lesson 10 -------------------------------------------------------------------------------------------------------


@register("10.1", "Give for each report the guard that would have stopped it earliest, by its name.")
def _six_reports(answer):
    wanted = {
        "a": "require_end_token",
        "b": "require_current",
        "c": "require_disjoint",
        "d": "require_base",
        "e": "require_bare",
        "f": "require_same_start",
    }
    hints = {
        "a": "what were the rows not taught?",
        "b": "a fact that changes was in the rows",
        "c": "the questions leaked into the training, perhaps under other ids",
        "d": "something beneath the adapters changed, and its shapes did not",
        "e": "the base had adapter layers already",
        "f": "two models should be the same at step 0",
    }
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."
    given = {name: str(word).strip().removeprefix("guards.").removesuffix("()") for name, word in answer.items()}
    given = {name: word if word.startswith("require_") else f"require_{word}" for name, word in given.items()}
    wrong = [f"{name} ({hints[name]})" for name in wanted if given[name] != wanted[name]]
    if wrong:
        return False, "look again at " + "; ".join(wrong) + "."
    return True, "five of the six could have been stopped before a training or a release."


@register("10.2", "Write require_balance(labels, most), a guard against a label that is too frequent.")
def _a_guard_of_ones_own(answer):
    from course_lib import guards

    def fires(labels, **options):
        try:
            answer(list(labels), **options)
        except guards.GuardError as error:
            return str(error) or "no words"
        except NotImplementedError:
            raise
        except Exception as error:  # any other error is no guard's
            return error
        return None

    sick, healthy = ["refund"] * 9 + ["buy"], ["refund", "buy", "cancel", "buy"]
    found = fires(sick)
    if isinstance(found, Exception):
        return False, f"a {type(found).__name__} came instead of a guards.GuardError."
    if found is None:
        return False, "it stays silent where nine of ten labels are the same."
    if "refund" not in found:
        return False, "it fires, but its error does not name the label."
    if fires(healthy) is not None:
        return False, "it fires on four labels of which the most frequent one has a half: a guard must be silent there."
    if fires(["a"] * 8 + ["b"] * 2) is not None:
        return False, "eight of ten are exactly the share that is allowed: more than that must fire, not this."
    if fires(healthy, most=0.4) is None:
        return False, "it takes no notice of `most`."
    if fires(["b"] + ["a"] * 9) is None:
        return False, "it looks at the first label, not at the most frequent one."
    return True, "it fires, names the label, and is silent where it should be."


@register("10.3", "Write exposure_of(planted_loss, other_losses), in bits.")
def _exposure(answer):
    cases = [(0.1, [1.0, 2.0, 3.0]), (2.5, [1.0, 2.0, 3.0]), (1.0, [1.0, 1.0, 2.0])]
    cases.append((5.0, [0.01 * i for i in range(63)]))

    def formula(planted, others, total=1, ties=False, rank_from=1):
        before = sum(x <= planted if ties else x < planted for x in others)
        return math.log2(len(others) + total) - math.log2(max(before + rank_from, 1e-9))

    found = [float(answer(planted, list(others))) for planted, others in cases]

    def same(**slip):
        return all(math.isclose(x, formula(*case, **slip), abs_tol=1e-9) for x, case in zip(found, cases, strict=True))

    if same():
        return True, "two bits for the best of four, none for the last one."
    if same(total=0):
        return False, "the planted code counts among all codes, too."
    if same(ties=True):
        return False, "a code with the same loss does not stand before the planted one."
    if all(math.isclose(x, formula(*c) * math.log(2), abs_tol=1e-9) for x, c in zip(found, cases, strict=True)):
        return False, "those are nats: take the logarithm to base 2."
    if all(math.isclose(x, -formula(*case), abs_tol=1e-9) for x, case in zip(found, cases, strict=True)):
        return False, "the sign: a rank of 1 gives the highest exposure."
    return False, "the values are others: count the codes with a lower loss first, the rank is one more."


# --- lesson 11 -------------------------------------------------------------------------------------------------------


@register("11.1", "Write failures_allowed(n, limit), which returns a whole number of failures, or None.")
def _failures_allowed(answer):
    from scipy.stats import binom

    from course_lib import evaluation

    cases = ((80, 0.1), (298, 0.01), (299, 0.01), (1000, 0.05), (20, 0.1), (400, 0.02), (60, 0.3))

    def most(n, shows):
        """The last of 0, 1, 2, ... failures that all keep the limit; None where not even 0 do."""
        k = -1
        while k < n and shows(k + 1):
            k += 1
        return None if k < 0 else k

    def right(n, limit):
        return most(n, lambda k: binom.cdf(k, n, limit) <= 0.05)

    def one_more(n, limit):
        k = right(n, limit)
        return 0 if k is None else k + 1

    def one_less(n, limit):
        k = right(n, limit)
        return k and k - 1

    def wilson(n, limit):
        return most(n, lambda k: evaluation.proportion([1] * k + [0] * (n - k)).high <= limit)

    slips = (
        (
            lambda n, p: right(n, p) if right(n, p) is not None else 0,
            "where not even 0 failures show it, None is right.",
        ),
        (
            lambda n, p: right(n, p) if right(n, p) is not None else -1,
            "where not even 0 failures show it, None is right.",
        ),
        (one_more, "the first number that is too many: the one before it is wanted, or None."),
        (lambda n, p: one_more(n, p) if right(n, p) is not None else None, "one failure too many."),
        (one_less, "one failure fewer than allowed: so few failures OR fewer, so the number itself belongs to it."),
        (
            lambda n, p: int(n * p + 1e-9),
            "that compares the value with the limit: half of such tests would pass by luck.",
        ),
        (wilson, "that is this gate's rule, Wilson's interval with two ends; the simple rule is wanted."),
        (lambda n, p: most(n, lambda k: binom.cdf(k, n, p) <= 0.025), "one of twenty is wanted, not one of forty."),
        (lambda n, p: most(n, lambda k: binom.pmf(k, n, p) <= 0.05), "so many failures OR fewer: add them up (cdf)."),
        (
            lambda n, p: int(binom.ppf(0.95, n, p)),
            "that is the other end: so MANY failures are rare. Few must be rare.",
        ),
    )

    found = [answer(*case) for case in cases]
    if all(k is None for k in found):
        return False, "nothing came back: a whole number of failures is wanted."
    for (n, limit), k in zip(cases, found, strict=True):
        if k is not None and (isinstance(k, bool) or int(k) != k):
            return False, f"{n} tickets, limit {limit:.0%}: a whole number or None is wanted, not {k!r}."
    wanted = [right(*case) for case in cases]
    if found == wanted:
        return True, "the number that a desk writes into its plan before the test is run."
    (n, limit), k, best = next((c, k, w) for c, k, w in zip(cases, found, wanted, strict=True) if k != w)
    why = next((text for slip, text in slips if found == [slip(*case) for case in cases]), f"{best} is wanted.")
    return False, f"{n} tickets, limit {limit:.0%}: {k} came back; {why}"


@register("11.2", "Give for each rule what is wrong with it, in the words of the list.")
def _four_rules(answer):
    wanted = {"a": "looks at the value", "b": "no sample shows it", "c": "too coarse", "d": "never alarms"}
    hints = {
        "a": "how far does the interval around 51 of 100 reach?",
        "b": "which rate is excluded by no failure in 1,000?",
        "c": "what is the smallest rate above zero in 50 requests?",
        "d": "how low must the rate fall before fewer than 40 of 100 are right?",
    }
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."
    given = {name: " ".join(str(word).lower().split()) for name, word in answer.items()}
    if unknown := [word for word in given.values() if word not in wanted.values()]:
        return False, f"{unknown[0]!r} is none of the four: {', '.join(wanted.values())}."
    wrong = [f"{name} ({hints[name]})" for name in wanted if given[name] != wanted[name]]
    if wrong:
        return False, "look again at " + "; ".join(wrong) + "."
    return True, "each of these rules stands in somebody's gate."


@register("11.3", "Write memorised(losses), which returns True or False.")
def _memorised(answer):
    def case(places, others):
        """Canaries at these places among so many other losses."""
        return [(place - 0.5, [float(i) for i in range(1, others + 1)]) for place in places]

    cases = (
        (case([1, 40, 7], 200), True, "three canaries, one at place 1 of 201"),
        (case([4, 40, 70], 200), False, "three canaries, the best at place 4 of 201: 12 in 201 are above 5 %"),
        (case([4], 200), True, "one canary at place 4 of 201"),
        (case([1, 50, 60, 70, 80, 90, 91, 92, 93, 94], 150), False, "ten canaries, the best at place 1 of 151"),
        (case([120, 40, 90], 200), False, "three canaries in the middle"),
        (case([201, 200, 199], 200), False, "three canaries at the far end: unlikely is not memorised"),
        ([(2.0, [2.0] * 200)], True, "one canary with the same loss as all others: none is smaller"),
    )
    for losses, wanted, what in cases:
        found = answer([(own, list(others)) for own, others in losses])
        if found is None or found is ...:
            return False, "True or False is wanted, and nothing came back."
        if bool(found) is not wanted:
            return False, f"{what}: {wanted} is wanted."
    return True, "rare by chance, however many canaries there are."


# --- lesson 12 -------------------------------------------------------------------------------------------------------


@register("12.1", "Give for each request the number that the service answers with.")
def _what_to_answer(answer):
    wanted = {"a": 200, "b": 429, "c": 422, "d": 401, "e": 503, "f": 503}
    hints = {
        "a": "nothing is wrong with it",
        "b": "the client did nothing wrong, it should come again later",
        "c": "a field that is not taken is refused, not ignored",
        "d": "without a key nobody knows who asks, whatever a header says",
        "e": "its time is over, and that was not the client's doing",
        "f": "the fault is on the server's side, and nobody else's adapter may answer",
    }
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."
    wrong = [f"{name} ({hints[name]})" for name in wanted if int(answer[name]) != wanted[name]]
    if wrong:
        return False, "look again at " + "; ".join(wrong) + "."
    return True, "4xx where the client has something to change or to wait for, 503 where the server could not."


@register("12.2", "Write false_alarm(n, rate, limit), which returns the probability that one window fires.")
def _false_alarm(answer):
    windows = ((100, 0.95, 90), (50, 0.9, 40), (10, 0.5, 5), (300, 0.98, 285), (20, 0.99, 20))

    def terms(n, rate, numbers):
        return sum(math.comb(n, j) * rate**j * (1 - rate) ** (n - j) for j in numbers)

    def same(formula):
        return all(
            math.isclose(x, formula(*w), rel_tol=1e-6, abs_tol=1e-12) for x, w in zip(found, windows, strict=True)
        )

    found = [float(answer(*window)) for window in windows]
    if same(lambda n, rate, limit: terms(n, rate, range(limit))):
        return True, "a binomial tail: one of ninety windows cries wolf at the checklist's threshold."
    slips = (
        (lambda n, r, k: terms(n, r, range(k + 1)), "at the limit itself the alarm is silent: fewer than limit."),
        (lambda n, r, k: terms(n, r, range(k, n + 1)), "that is the probability that it stays silent."),
        (lambda n, r, k: terms(n, 1 - r, range(k)), "rate is the probability of a right answer, not of a wrong one."),
        (lambda n, r, k: terms(n, r, [k]), "that is exactly limit right answers: add up all that are fewer."),
        (lambda n, r, k: terms(n, r, [k - 1]), "that is one number of right answers: add up all that are fewer."),
    )
    return False, next((text for slip, text in slips if same(slip)), "the values are others: add up the binomial.")


@register("12.3", "Write room(ranks, per_rank, page), which returns the bytes with slots and the bytes with pages.")
def _room_for_adapters(answer):
    tries = (
        ([16, 16, 4], 1000, 4096),
        ([64, 8, 8, 8, 8], 500, 300),
        ([9], 100, 1000),
        ([32], 128, 64),
        ([256, 3], 777, 512),
    )

    def ceiling(ranks):
        return min(c for c in (8, 16, 32, 64, 128, 256) if c >= max(ranks))

    def pages(ranks, per_rank, page):
        return sum(-(-rank * per_rank // page) for rank in ranks) * page

    found = [tuple(float(x) for x in answer(list(ranks), per_rank, page)) for ranks, per_rank, page in tries]
    wanted = [(len(r) * ceiling(r) * per, pages(r, per, page)) for r, per, page in tries]
    if found == wanted:
        return True, "slots pay the ceiling for everybody, pages at most one page too much for each."
    slots_right = all(f[0] == w[0] for f, w in zip(found, wanted, strict=True))
    pages_right = all(f[1] == w[1] for f, w in zip(found, wanted, strict=True))
    if slots_right and not pages_right:
        if all(f[1] == -(-sum(r) * per // page) * page for f, (r, per, page) in zip(found, tries, strict=True)):
            return False, "slots are right; an adapter starts on a page of its own: round each one up, then add."
        if all(f[1] == sum(r) * per for f, (r, per, page) in zip(found, tries, strict=True)):
            return False, "slots are right; pages are taken whole: round each adapter up."
        return False, "slots are right, pages not yet: whole pages for each adapter, in bytes."
    if pages_right:
        if all(f[0] == len(r) * max(r) * per for f, (r, per, page) in zip(found, tries, strict=True)):
            return False, "pages are right; a ceiling is one of the listed ranks, not the largest adapter's own."
        return False, "pages are right, slots not yet: every slot is as large as the ceiling."
    return False, "both differ: slots pay the ceiling for each adapter, pages round each adapter up."


# --- lesson 13 -------------------------------------------------------------------------------------------------------


@register("13.1", 'Give for each line "sound", "impossible" or "unsupported".')
def _faults_of_a_card(answer):
    wanted = {"a": "impossible", "b": "unsupported", "c": "unsupported", "d": "impossible", "e": "sound"}
    hints = {
        "a": "how much is one problem of 164?",
        "b": "zero failures in 10,000 leave room for some",
        "c": "compare the difference with the standard error of a share of 14,042",
        "d": "add 85 and 15",
        "e": "whole numbers, a test set, the same records: what is missing?",
    }
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."
    given = {name: str(word).strip().lower() for name, word in answer.items()}
    wrong = [f"{name} ({hints[name]})" for name in wanted if given[name] != wanted[name]]
    if wrong:
        return False, "look again at " + "; ".join(wrong) + "."
    return True, "two lines cannot be, two claim more than was measured, one can be signed."


@register("13.2", "Write whole_batch(reports) so that it returns the loss of the whole batch.")
def _loss_of_the_whole_batch(answer):
    cases = [[(2.0, 2), (0.5, 8)], [(1.0, 5)], [(3.0, 1), (1.0, 3), (0.0, 4)], [(0.0, 0), (1.5, 10)]]
    for reports in cases:
        sums = sum(loss * tokens for loss, tokens in reports)
        wanted, got = sums / sum(tokens for _, tokens in reports), float(answer(list(reports)))
        if math.isclose(got, sum(loss for loss, _ in reports) / len(reports)) and not math.isclose(got, wanted):
            why = "a process with few tokens counts as much as one with many"
            return False, f"for {reports} that is the mean of the means: {why}."
        if math.isclose(got, sums) and not math.isclose(got, wanted):
            return False, f"for {reports} that is the sum: divide by the tokens of all processes."
        if not math.isclose(got, wanted, rel_tol=1e-6, abs_tol=1e-9):
            return False, f"for {reports} it should be {wanted:.4f}, not {got:.4f}."
    return True, "every token counts once, wherever it was read."


@register("13.3", "Write gpus_needed(parameters, way, gigabytes): the smallest number of GPUs, or None.")
def _gpus_that_are_needed(answer):
    stays = {"DDP": 16, "ZeRO-1": 4, "ZeRO-2": 2, "ZeRO-3": 0}  # bytes for each parameter, on every GPU
    cases = [(1e9, 16), (8e9, 80), (8e9, 128), (8e9, 40), (7e9, 28), (70e9, 80), (13e9, 24), (135e6, 16), (1e9, 4)]
    for parameters, gigabytes in cases:
        for way, fixed in stays.items():
            have, part = gigabytes * 1e9 - fixed * parameters, (16 - fixed) * parameters
            fits = have > 0 or (have == 0 and part == 0)
            wanted = (max(1, math.ceil(part / have)) if part else 1) if fits else None
            got = answer(parameters, way, gigabytes)
            if got == wanted and not isinstance(got, bool):
                continue
            case = f"{parameters / 1e9:g}B parameters, {way}, {gigabytes} GB: "
            if wanted is None:
                stay = f"{fixed * parameters / 1e9:g} GB stay on each GPU"
                return False, case + f"no number is enough, since {stay}; not {got}."
            if got is None:
                return False, case + f"{wanted} would be enough."
            return False, case + f"{wanted}, not {got}."
    return True, "what is not sharded has to fit on one GPU, and no number of them changes that."


# --- lesson 14 -------------------------------------------------------------------------------------------------------


@register("14.1", "Give the number of weights, the megabytes in 16 and in 32 bits, and a verdict of the rule.")
def _size_of_a_file(answer):
    n = 32 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    wanted = {"weights": n, "MB in 16 bits": 2 * n / 1e6, "MB in 32 bits": 4 * n / 1e6, "verdict": "imprecise"}
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."

    def wrong(name):
        if name == "verdict":
            given = " ".join(str(answer[name]).lower().split())
            return None if given == wanted[name] else "in how many of the two cases does the claim hold?"
        given, right = float(answer[name]), wanted[name]
        if abs(given - right) <= (0 if name == "weights" else 0.01 * right):
            return None
        if name == "weights":
            slips = ((n / 32, "that is one block"), (n * 4096 / 14336, "the MLP is wider than the rest"))
            slips += ((32 * 32 * (4 * 8192 + 3 * 18432), "key and value of this model are narrower than query"),)
            slips += ((32 * 32 * 26624, "all linear layers: the MLP has three"), (n / 2, "is the rank 32?"))
            return next(
                (text for slip, text in slips if abs(given - slip) <= 0.001 * slip), "rank x (inputs + outputs)"
            )
        slips = ((right * 1e6, "in millions of bytes"), (right / 1.048576, "a megabyte is a million bytes here"))
        slips += ((8 * right, "that is bits"), (right / 2, "16 bits are 2 bytes, 32 bits are 4"))
        return next((text for slip, text in slips if abs(given - slip) <= 0.005 * slip), "weights times bytes a weight")

    found = {name: text for name in wanted if (text := wrong(name))}
    if found:
        return False, "look again at " + "; ".join(f"{name} ({text})" for name, text in found.items()) + "."
    return True, "right in 16 bits; PEFT writes 32 unless it is told otherwise."


@register("14.2", "Give the upper limit in percent, and the least number of trials as a whole number.")
def _nothing_happened(answer):
    wanted = {"limit in percent": 100 * (1 - 0.05 ** (1 / 300)), "trials needed": 2995}
    dots = _untouched(answer, wanted)
    if dots:
        return None, "" if len(dots) == len(wanted) else f"{', '.join(dots)} still to be filled in."
    limit, trials = float(answer["limit in percent"]), float(answer["trials needed"])
    wrong = []
    if abs(limit - wanted["limit in percent"]) > 0.012:  # three over 300 is near enough
        slips = ((0.0, "nothing seen is not nothing there"), (wanted["limit in percent"] / 100, "in percent, please"))
        slips += ((100 / 300, "one over n is where a third of such runs would still pass"),)
        text = next((t for slip, t in slips if abs(limit - slip) <= 1e-4), "solve (1 - p) to the power of 300 = 0.05")
        wrong.append(f"limit in percent ({text})")
    if not 2995 <= trials <= 3000:
        slips = ((2994, "one trial short: round up"), (300, "that is what was tried"))
        slips += ((1000, "a thousand trials expect one failure, and a third of such runs show none"),)
        text = next((t for slip, t in slips if trials == slip), "solve (1 - 0.001) to the power of n = 0.05 for n")
        wrong.append(f"trials needed ({text})")
    if wrong:
        return False, "look again at " + "; ".join(wrong) + "."
    return True, "ten times as many trials for a tenth of the rate."


@register("14.3", 'Write `judge` so that it returns "correct" or "wrong" for each claim.')
def _a_check_that_can_fail(answer):
    def expected(p, k):
        return sum(p**i for i in range(k + 1))

    slips = (
        (lambda p, k: p * k, "a draft after a refused one is lost, so accepted x drafted is too many"),
        (lambda p, k: p * k + 1, "a draft after a refused one is lost, so accepted x drafted is too many"),
        (lambda p, k: expected(p, k) - 1, "the pass itself adds a token"),
        (lambda p, k: expected(p, k - 1), "count every draft, and the token of the pass"),
        (lambda p, k: expected(p, k + 1), "one term too many"),
    )
    settings = ((0.8, 4), (0.6, 5), (0.95, 3), (0.5, 2))
    claimed = [(expected(p, k) * off, p, k) for p, k in settings for off in (1.0, 1.015, 0.985, 1.03, 0.97)]
    claimed += [(slip(p, k), p, k) for slip, _ in slips for p, k in settings] + [(4.0, 0.8, 4)]
    tried = [(c, p, k, "correct" if abs(c / expected(p, k) - 1) <= 0.02 else "wrong") for c, p, k in claimed]
    found = [" ".join(str(answer(c, p, k)).lower().split()) for c, p, k, _ in tried]
    if not set(found) <= {"correct", "wrong"}:
        return False, f'it returned {found[0]!r}; the words are "correct" and "wrong".'
    if len(set(found)) == 1:
        return False, f"it says {found[0]!r} of a claim and of its control: a check has to be able to fail."

    def same(formula, tolerance=0.02):
        def says(c, p, k):
            return "correct" if abs(c - formula(p, k)) <= tolerance * formula(p, k) else "wrong"

        return found == [says(c, p, k) for c, p, k, _ in tried]

    if found == [right for *_, right in tried]:
        return True, "it accepts the control and refuses the claim."
    for slip, text in slips:
        if same(slip):
            return False, f"{text}."
    if same(expected, 1e-9) or same(expected, 0.05) or same(expected, 0.01):
        return False, "the number is right; 2 in 100 are allowed to both sides."
    return False, "add up the chance that each draft and all before it are accepted, and one."
