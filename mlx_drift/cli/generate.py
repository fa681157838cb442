"""`mlx-drift generate`: the answer on stdout as it is accepted, the statistics on stderr."""

import json
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console

from mlx_drift.cli import options
from mlx_drift.cli.drafts import DraftsShown, Said, check_place, save_picture
from mlx_drift.cli.load import confident, copying, load_pair, load_target, windowed
from mlx_drift.cli.prompts import (
    PLACE,
    LaidOut,
    apply_template,
    encode,
    parse_object,
    read_grammar,
    read_prompt,
)
from mlx_drift.cli.report import explanation, in_short, report, table
from mlx_drift.cli.show import prompt_bar
from mlx_drift.decode.prompt_cache import PromptCache
from mlx_drift.decode.prompt_cache_file import load_prompt_cache
from mlx_drift.decode.responses import DriftResponse
from mlx_drift.decode.trees import drafting
from mlx_drift.demo import QUESTION
from mlx_drift.drafters.protocol import Drafter
from mlx_drift.errors import DriftError
from mlx_drift.generate import stream_generate
from mlx_drift.ranks.world import world
from mlx_drift.target.caches import KVQuantization

INTERRUPTED = 130  # the shell's code for Ctrl-C


def generate(
    text: options.Text = None,
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    model: options.Model = None,
    drafter: options.Drafter = None,
    adapter_path: options.AdapterPath = None,
    trust_remote_code: options.TrustRemoteCode = False,
    pipeline: options.Pipeline = False,
    system_prompt: options.SystemPrompt = None,
    prefill_response: Annotated[
        str | None, typer.Option(help="How the response is to begin.")
    ] = None,
    max_tokens: options.MaxTokens = 256,
    num_draft_tokens: options.NumDraftTokens = None,
    tree: options.Tree = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the numbers that auto decides by.")
    ] = False,
    temp: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    min_tokens_to_keep: options.MinTokensToKeep = 1,
    top_k: options.TopK = 0,
    xtc_probability: options.XtcProbability = 0.0,
    xtc_threshold: options.XtcThreshold = 0.1,
    seed: options.Seed = None,
    no_draft: Annotated[
        bool, typer.Option("--no-draft", help="Generate with mlx-lm alone.")
    ] = False,
    draft_model: options.DraftModel = None,
    lookup: options.Lookup = None,
    drafter_bits: options.DrafterBits = None,
    drafter_window: options.DrafterWindow = None,
    drafter_sinks: options.DrafterSinks = None,
    drafter_confidence: options.DrafterConfidence = None,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    grammar: options.GrammarFile = None,
    max_kv_size: options.MaxKvSize = None,
    kv_bits: options.KvBits = None,
    kv_group_size: options.KvGroupSize = KVQuantization.group_size,
    quantized_kv_start: options.QuantizedKvStart = KVQuantization.start,
    prefill_step_size: options.PrefillStepSize = 2048,
    prompt_cache_file: Annotated[
        Path | None,
        typer.Option(help="What `mlx-drift cache-prompt` wrote: the prompt goes on from there."),
    ] = None,
    ignore_chat_template: options.IgnoreChatTemplate = False,
    chat_template_config: options.ChatTemplateConfig = None,
    extra_eos_token: Annotated[
        list[str] | None, typer.Option(help="A further token that ends the text; repeatable.")
    ] = None,
    show_drafts: options.ShowDrafts = False,
    svg: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw what --show-drafts shows, as a picture."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Generate text through a drafter, losing nothing by it."""
    if svg is not None:
        check_place(svg)
    question = read_prompt(text, prompt, prompt_file)
    if question is None and model is not None:
        raise DriftError("no prompt; give it as an argument, with --prompt-file, or - for stdin")
    question = question or QUESTION
    held_to = read_grammar(json_schema, regex, grammar)
    template_keywords = parse_object(chat_template_config, "--chat-template-config")
    no = no_draft or None
    rows = options.read_tree(tree, num_draft_tokens=num_draft_tokens, no_draft=no)
    # The embedded pair shows drafting, whether it pays or not.
    k = options.read_draft_tokens(num_draft_tokens or ("3" if model is None else "auto"))
    if prompt_cache_file is not None:
        if world().size > 1:
            raise DriftError("--prompt-cache-file holds a whole target's rows, not a rank's part")
        settled = {
            "--no-draft": no_draft,
            "--system-prompt": system_prompt,
            "--max-kv-size": max_kv_size,
            "--kv-bits": kv_bits,
        }
        if given := [flag for flag, value in settled.items() if value not in (None, False)]:
            raise DriftError(
                f"{given[0]} is settled by {prompt_cache_file}: give it to cache-prompt instead"
            )
    console, stdout = Console(stderr=True), sys.stdout
    shown = DraftsShown(stdout)
    loaded: Drafter | None = None
    cache: PromptCache | None = None
    if no_draft:
        target, tokenizer = load_target(model, adapter_path, trust_remote_code, pipeline)
    else:
        target, tokenizer, loaded = load_pair(
            model,
            drafter,
            adapter_path,
            console,
            drafter_bits,
            draft_model,
            trust_remote_code,
            pipeline,
        )
    for token in extra_eos_token or []:
        _add_eos_token(tokenizer, token)
    lay_out = partial(
        apply_template,
        tokenizer,
        template_keywords=template_keywords,
        system_prompt=system_prompt,
        ignore=ignore_chat_template,
    )
    if loaded is not None:
        loaded = windowed(loaded, drafter_window, drafter_sinks, tokenizer, lay_out(PLACE))
        loaded = confident(loaded, drafter_confidence)
        loaded = copying(loaded, lookup, default=(rows or k) == "auto")
    if prompt_cache_file is not None and loaded is not None:
        cache = load_prompt_cache(prompt_cache_file, target, loaded)
        rest = lay_out(PLACE, prefill_response=prefill_response).after_place()
        tokens = cache.tokens + encode(tokenizer, LaidOut(question + rest, by_template=True))
    else:
        tokens = encode(tokenizer, lay_out(question, prefill_response=prefill_response))

    said: list[Said] = []
    last: DriftResponse | None = None
    interrupted = False
    try:
        # mlx-lm prints its warnings to stdout, which is the answer's alone.
        with redirect_stdout(sys.stderr), prompt_bar(console) as progress:
            for last in stream_generate(
                target,
                tokenizer,
                tokens,
                max_tokens,
                drafter=loaded,
                **drafting(k, rows),
                temp=temp,
                top_p=top_p,
                min_p=min_p,
                min_tokens_to_keep=min_tokens_to_keep,
                top_k=top_k,
                xtc_probability=xtc_probability,
                xtc_threshold=xtc_threshold,
                xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
                seed=seed,
                grammar=held_to,
                prompt_cache=cache,
                max_kv_size=max_kv_size,
                kv_bits=kv_bits,
                kv_group_size=kv_group_size,
                quantized_kv_start=quantized_kv_start,
                prefill_step_size=prefill_step_size,
                prompt_progress_callback=progress,
                compare_plain=loaded is not None,
            ):
                said.append(Said(last.text, last.token, last.origin))
                if show_drafts and not as_json:
                    shown.write(said[-1])
                elif not as_json:
                    print(last.text, end="", flush=True, file=stdout)
    except KeyboardInterrupt:
        interrupted = True
    except NotImplementedError as error:  # mlx-lm's, of sliding windows and kv_bits
        raise DriftError(f"mlx-lm cannot do this: {error}") from error
    if not interrupted:
        world().finish()  # an answer is told when all ranks are through it
    if as_json:
        told = report("".join(one.text for one in said), last, interrupted)
        if show_drafts:
            told["tokens"] = [one.to_dict() for one in said]
        typer.echo(json.dumps(told))
    else:
        typer.echo()
    if last is not None:
        console.print(table(last, interrupted))
        if show_drafts:
            console.print(shown.legend(said))
        if svg is not None:
            save_picture(svg, "mlx-drift generate --show-drafts", said, in_short(last))
        if explain and last.statistics.draft_length is not None:
            console.print(explanation(last.statistics.draft_length))
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _add_eos_token(tokenizer: TokenizerWrapper, token: str) -> None:
    if token not in tokenizer.get_vocab() and options.read_whole(token) is None:
        raise DriftError(
            f"--extra-eos-token {token}: the tokenizer has no such token; give one of its tokens, "
            "or a token id"
        )
    tokenizer.add_eos_token(token)
