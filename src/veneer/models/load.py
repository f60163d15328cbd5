"""Load a base, its skeleton or its weights by name: built-in, directory, GGUF file or hub name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import snapshot_download
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from veneer.errors import ConfigError, ModelError, listed, nearest
from veneer.kernels.transfer import PINNED
from veneer.models import gguf, minigpt
from veneer.models.assemble import assemble
from veneer.models.device import CPU, resolve_device, use_device
from veneer.models.dtype import resolve_dtype
from veneer.models.gguf_base import block_bits, kinds_of, load_blocks
from veneer.models.hub import on_hub
from veneer.models.locate import BUILT_IN, MINIGPT_HOME, locate
from veneer.models.placement import AS_THEY_ARE, Placement
from veneer.models.published import PublishedFiles, load_published
from veneer.models.quantize import quantized_model, second_rounding
from veneer.models.source import Source, adapter_file, open_source
from veneer.models.stored import load_quantized
from veneer.processes.world import ALONE, World
from veneer.quant.settings import Bits, LoadBits, Offload, quantization_of
from veneer.quant.stack import quantized_weights

# What every causal language model has at least one of.
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
# By default, transformers asks the user whether to run code that a model brings along.
OURS_ALONE: dict[str, Any] = {"trust_remote_code": False}


@dataclass(frozen=True)
class Base:
    """A frozen model with its tokenizer, and the name that it was loaded by.

    notices: what the user should know of the loading.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    notices: tuple[str, ...] = ()


def load_base(
    name: str | Path,
    *,
    dtype: str = "auto",
    bits: LoadBits | None = None,
    pack_head: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "auto",
    world: World = ALONE,
    offload: Offload = "none",
    offload_directory: Path | None = None,
) -> Base:
    """Load a base for training or generation, on a device: cpu, cuda, mps or xpu, with a number for
    one of several; auto is the accelerator where there is one.

    `name` is a built-in name, a transformers or MiniGPT directory, a .gguf file, or a hub name.
    With 4 or 8 `bits` its linear layers are quantized as they are read, with `pack_head` the head
    too; a base that is quantized already stays in its files, memory-mapped, and so do the linear
    layers of a .gguf file; an accelerator holds them in the same bits. With 16 they are dense, in
    `dtype`. With a world of several processes each of them holds its shard of each block, and none
    ever the whole base. With `offload` its blocks are in this machine's memory (cpu) or in files
    (disk; what is in none yet goes to one in `offload_directory`), and are copied to the device
    ahead of their use. Its tokenizer is read unless it is given. No code from a model's repository
    is ever run. Raises ModelError with what to do, and ConfigError for impossible settings.
    """
    if bits not in (None, *get_args(LoadBits)):
        raise ConfigError(f"bits is {bits!r}, but must be 4, 8 or 16.")
    if pack_head and bits not in get_args(Bits):
        raise ConfigError("pack_head would do nothing without bits; give bits 4 or 8 too.")
    if world.size > 1 and offload != "none":
        raise ConfigError("A base is sharded over processes or offloaded, not both; leave out one.")
    on = resolve_device(device)
    use_device(on)
    place = _at_hand(name)
    torch_dtype = dtype_of(place, dtype, on)
    notices: tuple[str, ...] = ()
    if offload == "cpu" and on.type not in PINNED:
        offload = "none"
        notices += (f"The base is not offloaded: {on} computes in the memory that it would go to.",)
    to = Placement(None if on.type == "cpu" else on, world, offload, offload_directory)
    with gguf.read_once():
        keeps_blocks = bits is None and stays_in_blocks(name, place)
        in_place = _is_gguf(place) and not keeps_blocks and bits not in get_args(Bits)
        config = None if in_place else load_config(name)
        quantization = None if config is None else quantization_of(config.to_dict())
        if config is not None and quantization and not (bits and quantization.is_published):
            if bits:
                raise ModelError(f"{name} is quantized already; leave bits out.")
            home = _on_disk(place)
            load = load_published if quantization.is_published else load_quantized
            model = load(home, skeleton_of(config, home), torch_dtype, to=to)
            if quantization.ignores:
                notices += (
                    f"{name} asks for {quantization.ignores}, which Veneer leaves as they are: its "
                    "weights alone are quantized here.",
                )
        elif quantization and config is not None and bits == 16:
            model, _ = _dequantized(place, config, torch_dtype, to=to)
        elif config is not None and (bits == 4 or bits == 8):
            source, more = _open_dense(place, config)
            notices += more
            if cost := cost_of_rounding(name, source, bits):
                notices += (f"{cost} Without --bits they stay as they are there.",)
            model = quantized_model(source, bits, torch_dtype, head=pack_head, to=to)
        elif config is not None and keeps_blocks:
            model, more = _with_blocks(Path(place), config, torch_dtype, to=to)
            notices += more
        elif to.is_by_blocks:
            config = config or load_config(name)
            model, more = _dequantized(place, config, torch_dtype, to=to)
            notices += more
        else:
            model = _dense(place, torch_dtype)
        tokenizer = tokenizer or _tokenizer(place)
    if isinstance(place, Path) and isinstance(locate(name), str):
        notices += (f"{name} is the copy in {place}, for the hub could not be asked.",)
    if isinstance(place, Path) and adapter_file(place):
        notices += (
            f"{name} holds an adapter's tensors too; they are left out, so this is the base alone. "
            "To keep the adapter, train with veneer.SaveAdapter, or veneer.merge before saving.",
        )
    # Adapters and merged models carry this name, by which the base is loaded again.
    model.config._name_or_path = str(name)
    # What came weight by weight is there already.
    if any(tensor.device != on for tensor in chain(model.parameters(), model.buffers())):
        model = model.to(on)  # type: ignore[arg-type]
    return Base(str(name), model.eval(), tokenizer, notices)


def cost_of_rounding(name: str | Path, source: Source, bits: Bits) -> str | None:
    """Return what it costs to quantize the base `name` to `bits` where its files hold quantized
    weights already, measured on one of them; None where they hold none."""
    place = locate(name)
    measured = second_rounding(source, bits)
    if measured is None or (_is_gguf(place) and not stays_in_blocks(name, place)):
        return None
    weight, error = measured
    if _is_gguf(place):
        kinds = listed(kinds_of(Path(place)))
    else:
        how = quantization_of(load_config(name).to_dict())
        kinds = "" if how is None else f"{how.bits} bits ({how.method})"
    return (
        f"This base's weights, rounded to {kinds} in its files, are rounded a second time, to "
        f"{bits} bits, which takes {error:.1%} of the length of {weight}. An adapter "
        "learns to make up for a part of that."
    )


def stays_in_blocks(name: str | Path, place: Path | str) -> bool:
    """Return whether the base `name` at `place` keeps a GGUF file's blocks, unless told otherwise.

    The built-in ones do not, for they are so small that the time is worth more than the memory.
    """
    return _is_gguf(place) and str(name) not in BUILT_IN


def bits_of_blocks(name: str | Path) -> float | None:
    """Return the bits a number of the base `name`'s weights that stay in its GGUF file's blocks.

    None where no weight does, and where there is no such base here.
    """
    try:
        place = locate(name)
    except ModelError:
        return None
    return block_bits(Path(place)) if stays_in_blocks(name, place) else None


def load_config(name: str | Path) -> PretrainedConfig:
    """Read a base's configuration; no weight is touched."""
    minigpt.register()
    if str(name) == "minigpt" and not minigpt.is_minigpt(MINIGPT_HOME):
        return minigpt.MiniGPTConfig()
    place = _at_hand(name)
    if _is_gguf(place):
        return gguf.load_config(Path(place))
    return _reading(place, lambda: AutoConfig.from_pretrained(place, **OURS_ALONE))


def load_config_and_tokenizer(
    name: str | Path,
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Read what can be known of a base without its weights."""
    with gguf.read_once():
        return load_config(name), _tokenizer(_at_hand(name))


def config_of(settings: Mapping[str, Any]) -> PretrainedConfig:
    """Return the configuration that transformers makes of a config.json's settings.

    Raises ModelError for an unknown model type and for impossible settings.
    """
    minigpt.register()
    model_type = str(settings.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"transformers knows no model type {model_type!r}"
            f"{nearest(model_type, CONFIG_MAPPING.keys())}."
        )
    kind = CONFIG_MAPPING[model_type]
    if problems := _impossible_sizes(settings, kind.attribute_map):
        raise ModelError(f"This config.json cannot be: {'; '.join(problems)}.")
    return _reading(Path("This config.json"), lambda: kind.from_dict(dict(settings)))


def _impossible_sizes(settings: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    own = [names.get(name, name) for name in SIZES]
    return [
        f"{name} is {settings[name]!r}, but must be a whole number of at least 1"
        for name in own
        if isinstance(value := settings.get(name), str | float | int)
        and not (isinstance(value, int) and value >= 1)
    ]


def load_skeleton(name: str | Path) -> PreTrainedModel:
    """Return the model's structure on the meta device: every shape, and no weight is read."""
    return skeleton_of(load_config(name))


def open_base(name: str | Path) -> tuple[Source, PreTrainedTokenizerBase, tuple[str, ...]]:
    """Return the weights of a base one at a time, its tokenizer, and notices.

    Raises ModelError for a base that is quantized by bitsandbytes or Veneer already.
    """
    with gguf.read_once():
        place, config = _at_hand(name), load_config(name)
        quantization = quantization_of(config.to_dict())
        if quantization is not None and not quantization.is_published:
            raise ModelError(f"{name} is quantized already.")
        source, notices = _open_dense(place, config)
        return source, _tokenizer(place), notices


def skeleton_of(config: PretrainedConfig, home: Path | None = None) -> PreTrainedModel:
    """Return a model on the meta device, with the generation settings in `home`, if any."""
    place = home or Path(config.name_or_path or "This model")
    minigpt.register()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{place} cannot be read: {config.model_type} is no causal language model that "
            "transformers knows."
        )
    with torch.device("meta"):
        skeleton = _reading(place, lambda: AutoModelForCausalLM.from_config(config, **OURS_ALONE))
    if home is not None and (home / "generation_config.json").is_file():
        skeleton.generation_config = _reading(home, lambda: GenerationConfig.from_pretrained(home))
    return skeleton


def _at_hand(name: str | Path) -> Path | str:
    """Return the directory or file that `name` means, or a hub name that the hub knows."""
    place = locate(name)
    return place if isinstance(place, Path) else on_hub(place)


def _open_dense(
    place: Path | str, config: PretrainedConfig, *, mapped: bool = False
) -> tuple[Source, tuple[str, ...]]:
    model: Any
    if _is_minigpt(place):
        model = _dense(place, torch.float32)
        return Source.of_model(skeleton_of(config), model, Path(place)), ()
    home = _on_disk(place)
    skeleton = skeleton_of(config, home)
    if quantization_of(config.to_dict()) is not None:
        published = PublishedFiles(home, skeleton, torch.float32)
        del skeleton.config.quantization_config
        return published.as_source(), ()
    source = open_source(home, skeleton, mapped=mapped)
    if source is not None:
        return source, ()
    if _is_gguf(place):
        model = gguf.load_model(home, dtype=torch.float32)
    else:
        auto = AutoModelForCausalLM
        model = _reading(place, lambda: auto.from_pretrained(place, dtype="auto", **OURS_ALONE))
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        config.tie_word_embeddings = False  # the files have two of them
    notice = "Its files cannot be read weight by weight, so all of the model was in memory at once."
    return Source.of_model(skeleton_of(config, home), model, home), (notice,)


def _dequantized(
    place: Path | str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    to: Placement = AS_THEY_ARE,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return a base as dense numbers, weight by weight, whatever its files hold, with notices."""
    source, notices = _open_dense(place, config, mapped=to.stays_in_files)
    weights = ((name, source.read(name)) for name in source.names)
    return assemble(source.skeleton, weights, dtype, to=to), notices


def _with_blocks(
    path: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    to: Placement = AS_THEY_ARE,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return the model of a GGUF file, its linear layers in the file's blocks where that can be."""
    model = load_blocks(path, skeleton_of(config), dtype, to=to)
    if model is None and to.is_by_blocks:
        return _dequantized(path, config, dtype, to=to)
    if model is None:
        return _dense(path, dtype), ()
    kinds = sorted({weight.label for weight in quantized_weights(model).values()})
    return model, (
        f"The linear layers stay in {path.name}, in its own blocks ({listed(kinds)}); --bits 16 "
        "would load them as dense numbers: faster, and larger.",
    )


def _tokenizer(place: Path | str) -> PreTrainedTokenizerBase:
    """Read the tokenizer of the base at `place`."""
    if _is_minigpt(place):
        return _reading(place, lambda: minigpt.load(Path(place))[1])
    if _is_gguf(place):
        return gguf.load_tokenizer(Path(place))
    return _reading(place, lambda: AutoTokenizer.from_pretrained(place, **OURS_ALONE))


def dtype_of(place: Path | str, asked: str, device: torch.device = CPU) -> torch.dtype:
    """Return the dtype to compute in: the one asked for, or the faster one on the device."""
    # So small a model as MiniGPT gains nothing from a shorter format.
    return resolve_dtype("float32" if _is_minigpt(place) and asked == "auto" else asked, device)


def _dense(place: Path | str, dtype: torch.dtype) -> PreTrainedModel:
    if _is_minigpt(place):
        return _reading(place, lambda: minigpt.load(Path(place))[0]).to(dtype)
    if _is_gguf(place) and gguf.has_experts(Path(place)):
        return _dequantized(place, gguf.load_config(Path(place)), dtype)[0]
    if _is_gguf(place):
        return gguf.load_model(Path(place), dtype=dtype)
    auto = AutoModelForCausalLM
    return _reading(place, lambda: auto.from_pretrained(place, dtype=dtype, **OURS_ALONE))


def _is_gguf(place: Path | str) -> bool:
    return isinstance(place, Path) and place.suffix == ".gguf"


def _is_minigpt(place: Path | str) -> bool:
    return isinstance(place, Path) and minigpt.is_minigpt(place)


def _on_disk(place: Path | str) -> Path:
    if isinstance(place, Path):
        return place
    patterns = ["*.json", "model*.safetensors"]
    return Path(_reading(place, lambda: snapshot_download(place, allow_patterns=patterns)))


def _reading(place: Path | str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:
        raise ModelError(f"{place} cannot be read as a causal language model: {error}") from error
