"""The policy: a language model with LoRA adapters (theta), its tokenizer and its device.

`load_policy` serves the embedded model, the tiny random one of the tests, a folder, or a hub id, decoder-only or
encoder-decoder. The base stays frozen; only the adapters are trainable. It does not train and does not sample.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from falconlib.config import LoraConfig, ModelConfig
from falconlib.errors import FalconError
from falconlib.files import sha256, sha256_of
from falconlib.policy import embedded

TINY_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass
class Policy:
    """A loaded model. model: transformers model, wrapped by peft when it has adapters. name, fingerprint: for run.json."""

    model: Any
    tokenizer: Any
    device: torch.device
    name: str
    fingerprint: str
    seq2seq: bool = False

    @property
    def inner(self) -> Any:
        """The transformers model inside the adapters' wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def eos(self) -> int:
        """Token id that ends a completion."""
        return self.tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that is already rendered: no special tokens are added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens) -> str:
        """Text of token ids without special tokens, spaces untouched."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters (theta), in a fixed order."""
        return [p for p in self.model.parameters() if p.requires_grad]


def resolve_device(name: str) -> torch.device:
    """ "auto", "cpu" or "cuda" -> device. Raises FalconError when a GPU is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise FalconError("model.device = 'cuda', but torch sees no GPU", "--set model.device=cpu, or see `falconlib doctor`")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def load_policy(config: ModelConfig, lora: LoraConfig | None = None, adapter: Path | None = None, seed: int = 0) -> Policy:
    """Loads a model and gives it adapters.

    Args:
        config: which model, device and number type.
        lora: fresh adapters of this shape, drawn from `seed` (B = 0: the policy starts as the base); None for none.
        adapter: folder of saved adapters to load instead; they stay trainable.

    Raises:
        FalconError: unknown model, missing files, no GPU, an adapter that does not fit.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    base, tokenizer, fingerprint = tiny_model() if config.name == "tiny" else pretrained(config)
    base.requires_grad_(False).eval()
    if config.name == "tiny":
        base.to(getattr(torch, config.dtype))
    if adapter is not None:
        model = load_adapter(base, Path(adapter))
    else:
        model = base if lora is None else add_lora(base, lora, seed)
    return Policy(model.to(device).eval(), tokenizer, device, config.name, fingerprint, bool(base.config.is_encoder_decoder))


def load_judge(name: str) -> Policy:
    """The model that judges (see judge/local.py): `name`, or the embedded one for ""; never the policy in training."""
    return load_policy(ModelConfig(name=name or embedded.NAME))


def pretrained(config: ModelConfig) -> tuple[Any, Any, str]:
    """Model, tokenizer and fingerprint of an embedded model, a folder or a hub id."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = str(embedded.model_dir()) if config.name == embedded.NAME else config.name
    try:
        kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(source).is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(source, dtype=getattr(torch, config.dtype))
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        remedy = f"use {embedded.NAME!r}, a folder that holds config.json, or a hub id (with network)"
        if config.name == embedded.NAME:
            remedy = f"delete {source}, then: make model"
        raise FalconError(f"model {config.name!r} could not be loaded: {first_line(error)}", remedy) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if config.name == embedded.NAME:
        fingerprint = embedded.WHEEL_SHA256[:16]
    elif Path(source).is_dir():  # other weights may lie there tomorrow
        files = (p for p in sorted(Path(source).iterdir()) if p.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja"))
        fingerprint = sha256_of({p.name: sha256(p) for p in files})[:16]
    else:
        fingerprint = str(getattr(model.config, "_commit_hash", None) or source)
    return model, tokenizer, fingerprint


def first_line(error: Exception) -> str:
    """First line of an error's message, its type when it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def tiny_model(seed: int = 0) -> tuple[Any, Any, str]:
    """A random-weight two-layer Llama with a small tokenizer trained on the committed tasks: tests need no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    data = Path(__file__).resolve().parents[2] / "data" / "basics" / "basics.jsonl"
    text = data.read_text(encoding="utf-8") if data.is_file() else "def f(x):\n    return x\n"
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        text.splitlines(),
        trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>", padding_side="left")
    tokenizer.chat_template = TINY_TEMPLATE
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                max_position_embeddings=2048,
                eos_token_id=0,
                pad_token_id=0,
                bos_token_id=None,
                **shape,
            )
        )
    return model, tokenizer, f"tiny-{seed}"


def lora_targets(base: Any, top_layers: int) -> list[str]:
    """Names of the linear layers that get adapters: all but the output head, in the last `top_layers` blocks (0: all)."""
    linear = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and m is not base.get_output_embeddings()]
    depth = lambda name: next((int(part) for part in name.split(".") if part.isdigit()), -1)  # noqa: E731
    last = max((depth(n) for n in linear), default=-1)
    return [n for n in linear if not top_layers or depth(n) > last - top_layers]


def add_lora(base: Any, lora: LoraConfig, seed: int) -> Any:
    """The base wrapped with fresh adapters: A drawn from `seed`, B = 0, dropout 0."""
    import peft

    targets = lora_targets(base, lora.top_layers)
    if not targets:
        raise FalconError(
            f"{type(base).__name__} has no nn.Linear layer for adapters besides its head (GPT-2's are Conv1D)",
            "use a model of another family: Llama, Qwen2, GPT-NeoX, T5",
        )
    task = peft.TaskType.SEQ_2_SEQ_LM if base.config.is_encoder_decoder else peft.TaskType.CAUSAL_LM
    config = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=targets, task_type=task)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5.23 for a renamed property
        torch.manual_seed(seed)
        return peft.get_peft_model(base, config)


def load_adapter(base: Any, folder: Path) -> Any:
    """The base wrapped with adapters saved in `folder` (adapter_config.json, adapter_model.safetensors)."""
    import peft

    if not (folder / "adapter_config.json").is_file():
        raise FalconError(f"no adapter in {folder}: adapter_config.json is missing", "name a folder that `falconlib train` wrote")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # as in add_lora
            model = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise FalconError(
            f"the adapter in {folder} does not fit the model: {first_line(error)}",
            "use the model named in its adapter_config.json",
        ) from error
    odd = [name for name in ("use_dora", "lora_bias") if getattr(model.peft_config["default"], name, False)]
    if odd:
        raise FalconError(f"the adapter in {folder} has {odd[0]}, which the fast weights leave out", "make it without")
    return model
