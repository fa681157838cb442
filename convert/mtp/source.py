"""Where an MTP head is: in the shards of its model, in a sidecar beside it, in a folder of its own.

mlx-lm leaves MTP tensors out when it converts a model, so `mlx-community` repositories lack them
even where their config says that there are some. They are absent only if an index says so.
"""

from collections.abc import Iterator

from mlx_drift.convert.mtp.layouts import Config, find_layout, text_config, wanted_by
from mlx_drift.convert.read.source import (
    CONFIG,
    Checkpoint,
    Folder,
    choose_weights,
    find_folder,
    read_config_of,
    read_folder,
    read_weights,
)
from mlx_drift.errors import DriftError
from mlx_drift.files.hub import HubFolder, never_downloaded

SIDECARS = "mtp.safetensors", "model-mtp.safetensors", "mtp/weights.safetensors"
"""MTPLX's and vllm-mlx's names, beside the weights of the model (youssofal/mtplx)."""
ADVERTISED = "mtp_num_hidden_layers", "num_nextn_predict_layers"


def read_mtp_checkpoint(source: str | HubFolder, revision: str | None = None) -> Checkpoint:
    """Reads the config of a model, and the headers of the files that hold its MTP head.

    Args:
        source: As in `mlx_drift.convert.read.source.find_folder`.
        revision: Branch, tag or commit on the Hub.

    Raises:
        DriftError: If the model's family is not known, or there is no such head.
    """
    folder, file = find_folder(source, revision)
    config = read_config_of(folder)
    if "drafter_type" in config:
        return read_folder(folder, file)  # converted already: the head is all there is
    layout, _ = find_layout(config, f"{folder.name}/{CONFIG}")
    wanted = wanted_by(layout, config)
    looked_at = []
    for place, entry in [(folder, file)] if file else _places(folder, config):
        files, tensors = read_weights(place, entry, wanted)
        looked_at.append(f"{place.name}/{entry}")
        if tensors:
            return Checkpoint(
                folder=place,
                config_file=f"{folder.name}/{CONFIG}",
                config=config,
                weights=looked_at[-1],
                weight_files=files,
                tensors=tensors,
                wanted=wanted,
            )
    if folder.is_partial:
        raise never_downloaded(folder.name, "the files of its MTP head were perhaps")
    promise = next((key for key in ADVERTISED if text_config(config).get(key)), None)
    said = f" though its config says {promise}" if promise else ""
    raise DriftError(
        f"{folder.name} has no MTP head{said}: {', '.join(looked_at)} holds none of its tensors. "
        "mlx-lm leaves them out when it converts a model; give the original repository"
    )


def _places(folder: Folder, config: Config) -> Iterator[tuple[Folder, str]]:
    """Yields where a head may be: sidecars first, then the weights of the model."""
    extra = config.get("mlx_lm_extra_tensors")
    named = extra.get("mtp_file") if isinstance(extra, dict) else None
    for name in (*([named] if isinstance(named, str) else []), *SIDECARS):
        parent, _, file = name.rpartition("/")
        place = folder.subfolder(parent) if parent else folder
        if place is not None and file in place.files:
            yield place, file
    yield folder, choose_weights(folder)
