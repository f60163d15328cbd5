"""What `veneer plan --devices` prints: how to share a run over alike devices, and at what cost."""

from __future__ import annotations

from dataclasses import replace

from rich.markup import escape
from rich.table import Table

from veneer.adapter.config import LoRA
from veneer.cli.console import bytes_text, page, quieten_libraries
from veneer.cli.plan_tables import WIDTH, mixture_lines, plain_table, planned, summary, trained_text
from veneer.plan.amounts import Amount
from veneer.plan.config import PlanConfig
from veneer.plan.devices import DevicePlan, best, least_changes, ways, whole_by_time
from veneer.plan.fit import MARGIN, flags
from veneer.plan.hardware import Devices
from veneer.plan.plan import Plan, replanned
from veneer.quant.settings import Bits

_HOSTS = {"cpu": "the host's memory", "disk": "the disk"}  # where an offloaded base is
FEWER_BITS: tuple[Bits, ...] = (8, 4)


def show_devices(
    model: str,
    lora: LoRA,
    config: PlanConfig,
    devices: Devices,
    *,
    link: int | None = None,
    formulas: bool = False,
) -> None:
    """Print how to train `model` on alike devices, with the memory and the traffic of each.

    link: bytes that a device sends in a second.
    """
    quieten_libraries()
    plan = planned(model, lora, config, on_card=True)
    count, memory = devices.count, devices.memory
    chosen = best(plan, count, memory)
    changes: list[DevicePlan] = []
    if chosen is None:
        roomy = int((1 - MARGIN) * memory)
        changes = least_changes(plan, count, roomy) or least_changes(plan, count, memory)
    shown = chosen or (changes[0] if changes else next(ways(plan, count)))
    output = page(WIDTH)
    output.print(f"[bold]{escape(model)}[/]  {summary(plan.sizes)}\n")
    output.print(f"{trained_text(plan)}\n")
    output.print(ways_table(plan, devices))
    output.print(f"\n{verdict(plan, chosen, changes, devices)}\n")
    if changes:
        output.print(changes_table(plan, changes))
        output.print(f"\nWith {_change(plan, changes[0])}:\n")
    output.print(_amounts_table("Memory of a device", shown.amounts, "peak", formulas=formulas))
    output.print()
    output.print(_amounts_table("Sent by a device", shown.sent, "a step", formulas=formulas))
    output.print()
    for line in [*mixture_lines(plan), *_copied(shown), *_traffic(shown, link)]:
        output.print(line)


def ways_table(plan: Plan, devices: Devices) -> Table:
    """Return each way to share the run with the plan's other settings, over fewer bits too."""
    titles = ("Bits", "Weights", "Forward", "Peak", "Sent a step", "Fits")
    table = plain_table(f"On {devices.count}", *titles)
    for bits_plan in _by_bits(plan):
        for way in ways(bits_plan, devices.count):
            table.add_row(
                *_how(way)[:2],
                bytes_text(sum(each.value for each in way.weights)),
                bytes_text(way.activations),
                *_costs(way),
                _fits(way.peak, devices.memory),
            )
    return table


def changes_table(plan: Plan, changes: list[DevicePlan]) -> Table:
    """Return what each change of a plan would come to."""
    table = plain_table("It would fit with", "Base", "Bits", "Rows", "Peak", "Sent a step")
    for way in changes:
        table.add_row(_change(plan, way), *_how(way), *_costs(way))
    return table


def verdict(
    plan: Plan, chosen: DevicePlan | None, changes: list[DevicePlan], devices: Devices
) -> str:
    """Return whether the plan fits the devices, and in which way."""
    number = f"{devices.count} device{'s' * (devices.count > 1)}"
    here = f"{number} of {bytes_text(devices.memory)} (GB: 10⁹ bytes)"
    if chosen is None:
        how = "it does not fit." if changes else "it does not fit, whatever its settings."
        return f"[yellow]{here}: {how}[/]" if changes else f"[red]{here}: {how}[/]"
    text = f"[green]{here}: it fits, {_in_words(chosen)}: {bytes_text(chosen.peak)} a device.[/]"
    if chosen.peak > (1 - MARGIN) * devices.memory:
        text = (
            f"[yellow]{here}: it just fits, {_in_words(chosen)}: {bytes_text(chosen.peak)} a "
            f"device, with less than {MARGIN:.0%} left.[/]"
        )
    gentler = whole_by_time(plan, devices.memory) if chosen.sharded == "base" else None
    if gentler is not None:
        whole = DevicePlan(gentler, devices.count)
        text += (
            f" With [bold]{flags(plan.config, gentler.config)}[/] the whole base fits on each "
            f"({bytes_text(whole.peak)}), and a step sends {bytes_text(whole.sent_bytes)} instead "
            f"of {bytes_text(chosen.sent_bytes)}."
        )
    return text


def _traffic(way: DevicePlan, link: int | None) -> list[str]:
    """Return what is sent in words, and in seconds where a link is named."""
    tokens = way.count // way.pieces * way.plan.config.tokens_per_batch
    each = f"A step of {tokens:,} tokens sends {bytes_text(way.sent_bytes)} from each device"
    ever = ""
    if way.sharded == "base" and way.pieces == 1:
        ever = ", and no more if its passes have more tokens"
    if way.count == 1:
        return []
    if link is None:
        return [f"[dim]{each}{ever}; --link 10GB/s says how long that takes.[/]"]
    seconds = way.sent_bytes / link
    return [
        f"{each}: {seconds:,.2f} s at {bytes_text(link)}/s, less what is hidden behind computing"
        f"{ever}."
    ]


def _copied(way: DevicePlan) -> list[str]:
    """Return in words what of an offloaded base is beside a device."""
    if not way.is_offloaded:
        return []
    beside = sum(each.value for each in way.plan.memory.beside)
    return [
        f"{bytes_text(beside)} of the base stay in {_HOSTS[way.plan.config.offload]}, from where a "
        f"step copies {bytes_text(way.copied.value)} to each device."
    ]


def _by_bits(plan: Plan) -> list[Plan]:
    """Return the plan, and its like over a base in fewer bits where that is frozen."""
    config = plan.config
    fewer = [bits for bits in FEWER_BITS if bits < config.base_bits and not config.mapped]
    if plan.trained.weights:
        fewer = []
    return [plan, *(replanned(plan, replace(config, bits=bits)) for bits in fewer)]


def _how(way: DevicePlan) -> tuple[str, str, str]:
    """Return a way in cells: its base, the base's bits, its rows."""
    base = "base sharded" if way.sharded == "base" else "replicated"
    base = "offloaded" if way.is_offloaded else base
    return (
        base,
        f"{way.plan.config.base_bits}",
        f"{way.pieces} pieces" * (way.pieces > 1) or "whole",
    )


def _costs(way: DevicePlan) -> tuple[str, str]:
    return bytes_text(way.peak), bytes_text(way.sent_bytes)


def _in_words(way: DevicePlan) -> str:
    base = (
        "with the base sharded over them, block by block"
        if way.sharded == "base"
        else "with the whole base on each (replicated)"
    )
    if way.is_offloaded:
        base = f"with the base copied from {_HOSTS[way.plan.config.offload]}, block by block"
    return f"{base} and each row in {way.pieces} pieces" if way.pieces > 1 else base


def _change(plan: Plan, way: DevicePlan) -> str:
    """Return what differs from the plan, in flags or as a number of devices."""
    changed = flags(plan.config, way.plan.config)
    if way.pieces > 1:
        return f"{changed} --context-parallel {way.pieces}".strip()
    return changed or f"{way.count} devices"


def _fits(peak: int, memory: int) -> str:
    if peak > memory:
        return "no"
    return "just" if peak > (1 - MARGIN) * memory else "yes"


def _amounts_table(title: str, amounts: tuple[Amount, ...], total: str, *, formulas: bool) -> Table:
    table = plain_table(title, "Bytes")
    if formulas:
        table.add_column("= sum of", overflow="fold")
    for amount in amounts:
        row = [amount.name, bytes_text(amount.value)]
        table.add_row(*row, *([amount.formula] if formulas else []))
    table.add_section()
    table.add_row(total, bytes_text(sum(amount.value for amount in amounts)), style="bold")
    return table
