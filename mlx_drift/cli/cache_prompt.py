"""`mlx-drift cache-prompt`: the start of many prompts, processed once and kept in a file."""

import json
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import typer
from rich.console import Console

from mlx_drift.cli import options
from mlx_drift.cli.load import load_pair
from mlx_drift.cli.prompts import PLACE, apply_template, encode, parse_object, read_prompt
from mlx_drift.cli.show import prompt_bar
from mlx_drift.decode.prompt_cache import make_prompt_cache
from mlx_drift.decode.prompt_cache_file import save_prompt_cache
from mlx_drift.errors import DriftError
from mlx_drift.target.caches import KVQuantization


def cache_prompt(
    prompt_cache_file: Annotated[Path, typer.Option(help="The file to write.")],
    text: options.Text = None,
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    model: options.Model = None,
    drafter: options.Drafter = None,
    draft_model: options.DraftModel = None,
    drafter_bits: options.DrafterBits = None,
    adapter_path: options.AdapterPath = None,
    trust_remote_code: options.TrustRemoteCode = False,
    system_prompt: options.SystemPrompt = None,
    max_kv_size: options.MaxKvSize = None,
    kv_bits: options.KvBits = None,
    kv_group_size: options.KvGroupSize = KVQuantization.group_size,
    quantized_kv_start: options.QuantizedKvStart = KVQuantization.start,
    prefill_step_size: options.PrefillStepSize = 2048,
    ignore_chat_template: options.IgnoreChatTemplate = False,
    chat_template_config: options.ChatTemplateConfig = None,
    as_json: options.AsJson = False,
) -> None:
    """Process how prompts begin, once: generate --prompt-cache-file goes on from there."""
    beginning = read_prompt(text, prompt, prompt_file)
    if beginning is None:
        raise DriftError("no prompt; give it as an argument, with --prompt-file, or - for stdin")
    if PLACE in beginning + (system_prompt or ""):
        raise DriftError(
            f"the prompt holds {PLACE}, which stands for what follows; word it otherwise"
        )
    template_keywords = parse_object(chat_template_config, "--chat-template-config")
    console = Console(stderr=True)
    target, tokenizer, loaded = load_pair(
        model, drafter, adapter_path, console, drafter_bits, draft_model, trust_remote_code
    )
    laid_out = apply_template(
        tokenizer,
        beginning + PLACE,
        template_keywords=template_keywords,
        system_prompt=system_prompt,
        ignore=ignore_chat_template,
    )
    tokens = encode(tokenizer, laid_out.before_place())
    cache = make_prompt_cache(
        target,
        loaded,
        max_kv_size=max_kv_size,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
        max_snapshots=0,
    )
    with prompt_bar(console) as progress:
        cache.read(tokens, step_size=prefill_step_size, progress=progress)
    save_prompt_cache(prompt_cache_file, cache)
    size = prompt_cache_file.stat().st_size
    if as_json:
        told = {"prompt_cache_file": str(prompt_cache_file), "prompt_tokens": len(tokens)}
        memory = {"bytes": size, "peak_memory_gb": mx.get_peak_memory() / 1e9}
        typer.echo(json.dumps(told | memory))
    else:
        typer.echo(f"{prompt_cache_file}: {len(tokens)} tokens, {size / 1e6:.1f} MB")
