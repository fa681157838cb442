"""`mlx-drift serve`: an HTTP server that speaks OpenAI's API, and Anthropic's."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import mlx.nn as nn
import typer
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console

from mlx_drift.cli import options
from mlx_drift.cli.load import PROMPT_LOOKUP, copying, load_pair, load_target, usual_drafter
from mlx_drift.cli.prompts import parse_object
from mlx_drift.demo import NAME, TARGET
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.drafters.protocol import Drafter
from mlx_drift.errors import DriftError

if TYPE_CHECKING:
    from mlx_drift.serve.model import LoadedModel, Settings
    from mlx_drift.serve.models import Known

KEY = "MLX_DRIFT_API_KEY"
FIXED_DRAFTS = 3
"""Drafts a round of the embedded pair."""


def serve_command(
    model: options.Model = None,
    drafter: options.Drafter = None,
    draft_model: options.DraftModel = None,
    lookup: options.Lookup = None,
    no_draft: Annotated[bool, typer.Option("--no-draft", help="Decode without drafts.")] = False,
    adapter_path: options.AdapterPath = None,
    drafter_bits: options.DrafterBits = None,
    trust_remote_code: options.TrustRemoteCode = False,
    pipeline: options.Pipeline = False,
    num_draft_tokens: options.NumDraftTokens = None,
    tree: options.Tree = None,
    host: Annotated[str, typer.Option(help="Another than loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for any that is free.", min=0, max=65535)] = 8080,
    api_key: Annotated[
        str | None, typer.Option(help=f"What callers must show. Better: {KEY}, which `ps` hides.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A further name of this server.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="A web page that may ask.")
    ] = None,
    allow_models: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL[=DRAFTER]",
            help="A further model that requests may name: a folder or Hub repository. Its drafter: "
            "a known one, or prompt lookup.",
        ),
    ] = None,
    any_model_name: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Names that the default model answers to: claude-*"),
    ] = None,
    idle_unload: Annotated[
        float | None, typer.Option(metavar="MINUTES", help="Unload a model that nobody asks.")
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option("--max-tokens", "-m", help="Of an answer whose request does not say.", min=1),
    ] = 4096,
    temp: options.Temperature = 0.0,
    top_p: options.TopP = 0.0,
    top_k: Annotated[int, typer.Option(help="So many of the likeliest tokens; 0 for all.")] = 0,
    min_p: options.MinP = 0.0,
    chat_template_config: options.ChatTemplateConfig = None,
    running: Annotated[int, typer.Option(help="Answers that take turns.", min=1)] = 8,
    queue: Annotated[int, typer.Option(help="Requests that wait; 429 past it.", min=0)] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds of a request in all.", min=0.1)] = 600.0,
    body_timeout: Annotated[
        float, typer.Option(help="Seconds in which a request's body must have come.", min=0.1)
    ] = 30.0,
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds in which answers may end after SIGTERM.", min=0.1)
    ] = 10.0,
    keepalive: Annotated[
        float,
        typer.Option(help="Seconds of silence after which a stream says something.", min=0.01),
    ] = 5.0,
    cache_bytes: Annotated[
        int | None,
        typer.Option(help="Bytes of all caches. Default: a quarter of the device's memory.", min=1),
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Keep caches on disk too, over restarts.")
    ] = None,
    cache_dir_bytes: Annotated[int, typer.Option(help="Bytes of those.", min=1)] = 20 << 30,
    prefill_step_size: options.PrefillStepSize = 2048,
    kv_bits: options.KvBits = None,
    kv_group_size: options.KvGroupSize = 64,
    quantized_kv_start: options.QuantizedKvStart = 5000,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts to stderr.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout once it listens.")
    ] = False,
) -> None:
    """Serve OpenAI's and Anthropic's APIs: conversations take turns, caches are kept.

    One conversation's rounds take turns with the others'; what was read of a prompt is kept and
    found again. The embedded pair by default. The keys of requests: mlx_drift/serve/README.md.
    """
    try:
        from mlx_drift.serve.api.served import Defaults
        from mlx_drift.serve.engine import Limits
        from mlx_drift.serve.model import Settings
        from mlx_drift.serve.models import Known, called, weight_bytes
        from mlx_drift.serve.run import Options, serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in (
            "starlette",
            "uvicorn",
            "prometheus_client",
        ):
            raise
        raise DriftError(
            f"serve needs {error.name}, which is not installed: pip install 'mlx-drift[serve]'"
        ) from None
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    console = Console(stderr=True)
    no = no_draft or None
    rows = options.read_tree(tree, num_draft_tokens=num_draft_tokens, no_draft=no)
    is_fixed = isinstance(rows, int) or (model is None and rows is None)
    chosen = num_draft_tokens or (str(FIXED_DRAFTS) if is_fixed else "auto")
    settings = Settings(
        num_draft_tokens=0 if no_draft else options.read_draft_tokens(chosen),
        prefill_step_size=prefill_step_size,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
        tree=rows,
    )
    if no_draft and (drafter is not None or draft_model is not None):
        raise DriftError("--no-draft and a drafter are both given; give one of them")
    if no_draft and lookup:
        raise DriftError("--no-draft and --lookup are both given; give one of them")

    def load() -> "LoadedModel":
        return _load(
            NAME if model is None else called(model),
            settings,
            lambda: (
                _without_drafts(model, adapter_path, trust_remote_code, pipeline)
                if no_draft
                else load_pair(
                    model,
                    drafter,
                    adapter_path,
                    console,
                    drafter_bits,
                    draft_model,
                    trust_remote_code,
                    pipeline,
                )
            ),
            lookup,
        )

    default = Known(
        NAME if model is None else called(model),
        load,
        lambda: weight_bytes(model or str(TARGET)),
        frozenset({NAME} if model is None else {model, called(model)}),
    )
    serve(
        [default, *(_allowed(name, settings, lookup, console) for name in allow_models or [])],
        Options(
            host=host,
            port=port,
            api_key=api_key if api_key is not None else os.environ.get(KEY),
            hosts=allow_host or (),
            origins=cors_origin or (),
            patterns=any_model_name or (),
            limits=Limits(running, queue, timeout),
            cache_bytes=cache_bytes,
            cache_dir=cache_dir,
            cache_dir_bytes=cache_dir_bytes,
            idle_seconds=None if idle_unload is None else idle_unload * 60,
            body_seconds=body_timeout,
            shutdown_seconds=shutdown_timeout,
            keepalive=keepalive,
            defaults=Defaults(
                max_tokens,
                temp,
                top_p,
                top_k,
                min_p,
                parse_object(chat_template_config, "--chat-template-config"),
            ),
            log_prompts=log_prompts,
        ),
        say=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
        ready=lambda name, url: (
            print(json.dumps({"model": name, "url": url}), flush=True) if as_json else None
        ),
    )


def _allowed(source: str, settings: "Settings", lookup: bool | None, console: Console) -> "Known":
    """Returns a model that requests may name."""
    from mlx_drift.serve.models import Known, called, weight_bytes

    model, _, drafter = source.partition("=")
    drafter = drafter or usual_drafter(model)
    return Known(
        called(model),
        lambda: _load(
            called(model),
            settings,
            lambda: load_pair(model, drafter, None, console),
            None if drafter == PROMPT_LOOKUP else lookup,
        ),
        lambda: weight_bytes(model),
        frozenset({model, called(model)}),
    )


def _load(
    name: str,
    settings: "Settings",
    load: Callable[[], tuple[nn.Module, TokenizerWrapper, Drafter]],
    lookup: bool | None,
) -> "LoadedModel":
    from mlx_drift.serve.model import LoadedModel

    target, tokenizer, drafter = load()
    if settings.num_draft_tokens:
        drafter = copying(drafter, lookup, default=settings.num_draft_tokens == "auto")
    return LoadedModel(name, target, tokenizer, drafter, settings)


def _without_drafts(
    model: str | None, adapter_path: str | None, trust_remote_code: bool, pipeline: bool
) -> tuple[nn.Module, TokenizerWrapper, Drafter]:
    """Loads a target with the drafter that costs nothing, which is then never asked."""
    target, tokenizer = load_target(model, adapter_path, trust_remote_code, pipeline)
    return target, tokenizer, PromptLookupDrafter(target)
