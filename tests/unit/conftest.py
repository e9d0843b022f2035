"""A model small enough to be built in a blink: random weights, bytes as tokens, the base's chat format."""

import pytest

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tiny_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        padding_side="left",
        chat_template=TEMPLATE,
    )


@pytest.fixture
def tiny_model():
    """A function: each call builds the same float32 model, with the course's attention unless another is named."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from course_lib import models

    def build(attention=None, dtype=torch.float32):
        config = LlamaConfig(
            vocab_size=259,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.4,  # large: the best token stands clear of the others, so equality is no accident
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        config._attn_implementation = attention or models._register_attention()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(config).to(dtype).eval()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # quicker for a model of this size, above all on a busy machine
    yield build
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_lora(tiny_model):
    """The same with a LoRA adapter that does something (its B is not zero)."""
    import torch
    from peft import LoraConfig, get_peft_model

    def build(**options):
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
        base = tiny_model()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = get_peft_model(base, config)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return build


@pytest.fixture
def said(capsys):
    """What the check of an exercise prints about an answer: said(exercise, answer)."""
    from course_lib import exercises

    def check(exercise, answer):
        exercises.check(exercise, answer)
        return capsys.readouterr().out.strip()

    return check
