"""The memory of a training run, line by line, each with its formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from veneer.models.description import Layer
from veneer.plan.activations import FLOAT32, holes, kept, kept_on_disk
from veneer.plan.amounts import Amount, Term, amount
from veneer.plan.card import card_workspace
from veneer.plan.config import OptimizerName, PlanConfig
from veneer.plan.methods import Trained
from veneer.plan.routed import prepared_products
from veneer.plan.shards import shards_of
from veneer.plan.sizes import Sizes
from veneer.plan.workspace import workspace

# Bits of a number in NF4: its code, 8 bits a block of 64 for the scale, and 32 bits for each 256 of
# those (Dettmers et al. 2023, section 3).
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
# Bytes of a moment of AdamW: in float32; in 8 bits, with a float32 scale for each 256 of them
# (training/adamw8bit.py). Those of a weight with fewer numbers than LEAST are in float32
# nevertheless, as bitsandbytes has it (optim/optimizer.py).
LEAST = 4096
MOMENT: dict[OptimizerName, float] = {"adamw": 4, "adamw8bit": 1 + 4 / 256}
MOMENT["paged-adamw8bit"] = MOMENT["adamw8bit"]
# Resident besides all that is planned, on Linux: 350 MB after importing Veneer, torch and
# transformers, 85 MB more after reading a model and its tokenizer, and 85 MB from the first step on
# (threads, products prepared by oneDNN). `python -m bench.planned` prints the first two.
RUNTIME = 520_000_000
GROWTH = 170_000_000  # the part of it after the imports
# Of a card, beside tensors: CUDA's context with its kernels, and cuBLAS' workspace (32 MB on
# Hopper, 8 MB elsewhere). A guess that no card has been asked for yet.
CARD_RUNTIME = 600_000_000
RUNTIME_NOTES = ("libraries, threads, what loading leaves", "the card's context and kernels")


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs at its peak, in bytes. Not counted is what is mapped, `on_disk`, and what is
    in the memory of a GPU's host, `on_host`."""

    weights: Amount
    adapters: Amount
    gradients: Amount
    optimizer: Amount
    activations: Amount
    workspace: Amount
    runtime: Amount
    on_disk: Amount
    on_host: Amount

    @property
    def amounts(self) -> tuple[Amount, ...]:
        """The amounts that sum to the peak."""
        beside = ("on_disk", "on_host")
        return tuple(getattr(self, f.name) for f in fields(self) if f.name not in beside)

    @property
    def beside(self) -> tuple[Amount, ...]:
        """The amounts that do not count, as far as there are some."""
        return tuple(each for each in (self.on_disk, self.on_host) if each.value)

    @property
    def peak(self) -> int:
        return sum(each.value for each in self.amounts)


def plan_memory(
    config: PlanConfig,
    sizes: Sizes,
    trained: Trained,
    *,
    runtime: int = RUNTIME,
    masters: bool = True,
    on_card: bool = False,
    drawn: int = 0,
    teacher: int = 0,
) -> MemoryPlan:
    """Return the memory that training `trained` of a model needs.

    runtime: bytes that are resident before any model is. masters: whether weights of 16 bits that
    train have float32 ones, to which the steps are added (Micikevicius et al. 2018, section 3.1).
    on_card: whether it is a GPU's memory. drawn: tokens whose keys and values are held while
    answers are drawn. teacher: bytes of one that is there meanwhile.
    """
    width, count = config.width, trained.count
    own = bool(trained.weights)  # they train in their own dtype; new parameters are float32
    trained_width = width if own else FLOAT32
    quantized, rest = weight_terms(config, sizes)
    # Dense weights that are stored in another dtype than that of computing are cast into memory.
    is_cast = width == FLOAT32 or (sizes.stored is not None and not sizes.stored.rest_mapped)
    stays = config.mapped and not on_card  # a card has a copy
    mapped = [] if not stays else quantized if is_cast else quantized + rest
    weights = [term for term in quantized + rest if term not in mapped]
    offloaded: tuple[Term, ...] = ()
    # A processor computes in the memory that `cpu` means.
    if config.offload == "disk" or (config.offload == "cpu" and on_card):
        order = shards_of(config, sizes, 1, trained.first_block)
        weights, offloaded = [*order.gathered.terms, *order.whole.terms], order.own.terms
        mapped = list(offloaded) if config.offload == "disk" else []
    if teacher:
        weights.append(Term.of(teacher, "bytes", note="the teacher"))
    new = 0 if own else count + trained.beside
    optimizer = _moments(config.optimizer, trained)
    has_masters = own and masters and width < FLOAT32
    if has_masters:
        optimizer.append(Term.of(count, "masters", FLOAT32, "bytes", note="float32"))
    lasting = kept(config, sizes, trained)
    if not on_card:  # whose memory is no heap
        lasting.append(holes(config, sizes, trained))
    activations = amount("activations", *lasting)
    passing = (card_workspace if on_card else workspace)(config, sizes, trained)
    answers = Term.of(
        *(drawn, "tokens", 2 * sum(block.kv for block in sizes.blocks), "numbers"),
        *(width, "bytes"),
        note="keys and values while answers are drawn",
    )
    if on_card:  # which holds them throughout
        passing = amount("workspace", *passing.terms, answers)
    elif answers.value > activations.value + passing.value:  # which are not there then
        activations, passing = amount("activations"), amount("workspace", answers)
    if has_masters:
        stepping = Term.of(
            *(count, "parameters", FLOAT32, "bytes"),
            note="gradients in float32 while the optimizer steps, when no activations are there",
        )
        if stepping.value > activations.value + passing.value:
            activations, passing = amount("activations"), amount("workspace", stepping)
    return MemoryPlan(
        weights=amount("weights", *weights),
        adapters=amount(
            "adapters",
            Term.of(new, "parameters", FLOAT32, "bytes", note="float32"),
            Term.of(new, "parameters", width, "bytes", note="in the dtype of computing"),
        ),
        gradients=amount("gradients", Term.of(count, "parameters", trained_width, "bytes")),
        optimizer=amount("optimizer", *optimizer),
        activations=activations,
        workspace=passing,
        runtime=amount(
            "runtime",
            Term.of(runtime, "bytes", note=RUNTIME_NOTES[on_card]),
            *([] if on_card else prepared_products(config, sizes.blocks, config.tokens_per_batch)),
        ),
        on_disk=amount("on disk, mapped", *mapped, *kept_on_disk(config, sizes, trained)),
        on_host=amount("in the host's memory", *(offloaded if config.offload == "cpu" else ())),
    )


def _moments(optimizer: OptimizerName, trained: Trained) -> list[Term]:
    small = sum(n for n in trained.each if n < LEAST) if optimizer != "adamw" else 0
    how = (2, "moments", trained.count - small, "parameters", MOMENT[optimizer], "bytes")
    terms = [Term.of(*how, note="AdamW" + " in 8 bits" * (optimizer != "adamw"))]
    if small:
        how = (2, "moments", small, "parameters", FLOAT32, "bytes")
        terms.append(Term.of(*how, note=f"of weights with fewer than {LEAST:,} numbers"))
    return terms


def weight_terms(
    config: PlanConfig, sizes: Sizes, layers: Sequence[Layer] | None = None
) -> tuple[list[Term], list[Term]]:
    """Return the bytes of weights: quantized, and in the dtype of computing. Of all layers, unless
    some are given."""
    width, whole = config.width, layers is None
    if layers is None:
        layers = sizes.description.layers
    parameters = sum(layer.parameters for layer in layers)
    if config.base_bits >= 16:
        return [], [Term.of(parameters, "parameters", width, "bytes")]
    inside = {layer.path for layer in layers}
    small = sizes.quantized(as_stored=config.mapped, head=config.pack_head)
    small = [layer for layer in small if layer.path in inside]
    numbers = sum(layer.out * layer.in_ for layer in small)
    note = "embeddings, norms, biases" + ("" if config.pack_head else ", head")
    rest = Term.of(
        *(parameters - numbers, "parameters", width, "bytes"), note=note if whole else "dense"
    )
    return quantized_terms(config, sizes, small), [rest]


def quantized_terms(config: PlanConfig, sizes: Sizes, layers: Sequence[Layer]) -> list[Term]:
    """Return the bytes of layers in 4 or 8 bits, or in the published format of their files; of a
    stack, each expert has scales of its own."""
    numbers = sum(layer.out * layer.in_ for layer in layers)
    stored = sizes.stored
    if config.mapped and stored is not None and stored.format:
        bits = stored.bits_a_number
        note = f"{stored.format}: {bits:.3f} bits"
        return [Term.of(numbers, "numbers", bits / 8, "bytes", note=note)]
    if config.base_bits == 4:
        note = f"NF4: {NF4_BITS:.3f} bits"
        return [Term.of(numbers, "numbers", NF4_BITS / 8, "bytes", note=note)]
    rows = sum(layer.out for layer in layers)
    codes = Term.of(numbers, "numbers", 1, "byte", note="8-bit codes")
    return [codes, Term.of(rows, "rows", FLOAT32, "bytes", note="a scale each")]
