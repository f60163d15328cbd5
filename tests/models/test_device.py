import ast
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import veneer
from veneer.errors import ConfigError
from veneer.models import device as devices
from veneer.models.device import (
    CPU,
    RandomNumbers,
    computes_bf16,
    device_name,
    device_of_run,
    free_memory,
    peak_memory,
    resolve_device,
)
from veneer.models.device_names import parse_device
from veneer.models.dtype import resolve_dtype
from veneer.training.recipe import Recipe


class Machine:
    """What torch would say on a machine with some accelerators; `built` where it finds none."""

    def __init__(self, kind=None, count=0, current=0, free=None, **module):
        self.kind, self.count, self.current, self.free = kind, count, current, free
        self.module = SimpleNamespace(**module)

    def current_accelerator(self, check_available=False):
        none = self.kind is None or (check_available and not self.count)
        return None if none else torch.device(self.kind)

    def current_device_index(self):
        return self.current

    def device_count(self):
        return self.count

    @contextmanager
    def device_index(self, index):
        before, self.current = self.current, index
        yield
        self.current = before

    def get_memory_info(self, device):
        if self.free is None:
            raise RuntimeError("the device does not say")
        return self.free, 24_000

    def memory_reserved(self, device):
        return 700

    def memory_allocated(self, device):
        return 300

    def get_device_capability(self, device):
        return {"supported_dtypes": {torch.float32}}


@pytest.fixture
def machine(monkeypatch):
    def becomes(*arguments, **options):
        made = Machine(*arguments, **options)
        monkeypatch.setattr(torch, "accelerator", made)
        monkeypatch.setattr(torch, "get_device_module", lambda device: made.module)
        return made

    return becomes


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_auto_is_the_accelerator_that_there_is(machine, kind):
    machine(kind, 2, current=1)
    assert (
        resolve_device() == resolve_device("auto") == resolve_device(kind) == torch.device(kind, 1)
    )
    assert resolve_device(f"{kind}:0") == resolve_device(torch.device(kind, 0))
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("there", [(None, 0), ("cuda", 0), ("hpu", 1)])
def test_auto_is_the_processor_where_there_is_none(machine, there):
    machine(*there)
    assert resolve_device("auto") == CPU


@pytest.mark.parametrize(
    ("there", "name", "says"),
    [
        ((None, 0), "cuda", r"torch \S+ is not built for cuda.*computes on cpu: .*pytorch\.org"),
        (("mps", 1), "cuda:0", r"'cuda:0'.*not built for cuda.*computes on cpu and mps"),
        (("cuda", 0), "cuda", r"finds no cuda device.*driver.*There is cpu"),
        (("xpu", 2), "xpu:2", r"finds 2 xpu here: take xpu:0 to 1, or leave it out"),
        (("cuda", 1), "cuda:1", r"finds 1 cuda here: take cuda:0"),
        (("cuda", 1), "gpu", r"'gpu', but must be auto, cpu, cuda, mps or xpu.*cuda:1"),
    ],
)
def test_a_device_that_is_not_there_is_an_error_that_says_what_is(machine, there, name, says):
    machine(*there)
    with pytest.raises(ConfigError, match=says):
        resolve_device(name)


@pytest.mark.parametrize("name", ["", "cpu:0", "auto:1", "cuda:", "cuda:-1", "CUDA", "meta"])
def test_what_is_no_name_of_a_device(name):
    with pytest.raises(ConfigError, match="but must be"):
        parse_device(name)
    with pytest.raises(ConfigError, match=r"device is .*but must be"):
        Recipe("m", Path("d.jsonl"), device=name)


def test_processes_take_a_device_each(machine):
    machine("cuda", 4, current=3)
    assert device_of_run("auto", 4) == device_of_run("cuda", 4) == torch.device("cuda", 3)
    assert device_of_run("cuda:1", 1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"'cuda:1', but 4 processes take one each: name cuda w"):
        device_of_run("cuda:1", 4)
    assert device_of_run("cuda", 8, here=4).type == "cuda"  # on two machines
    with pytest.raises(ConfigError, match=r"8 processes of this machine .* finds 4: start no more"):
        device_of_run("cuda", 8, here=8)
    assert device_of_run("cpu", 8, here=8) == CPU
    machine("mps", 1)
    with pytest.raises(ConfigError, match="2 processes cannot share one mps: take device cpu"):
        device_of_run("auto", 2)


# Whether a card multiplies bfloat16 itself, whether it has such numbers, and what auto is there.
CARDS = {
    "Hopper": (True, True, torch.bfloat16),
    "Turing": (False, True, torch.float32),
    "older": (False, False, torch.float32),
}


@pytest.mark.parametrize("card", CARDS)
def test_auto_is_bf16_where_the_card_multiplies_it(machine, card):
    itself, at_all, auto = CARDS[card]

    def is_bf16_supported(*, including_emulation):
        return at_all if including_emulation else itself

    machine("cuda", 1, is_bf16_supported=is_bf16_supported, get_device_name=lambda device: card)
    device = torch.device("cuda", 0)
    assert resolve_dtype("auto", device) == auto
    assert resolve_dtype("float32", device) == torch.float32
    if at_all:
        assert resolve_dtype("bf16", device) == torch.bfloat16
        return
    with pytest.raises(
        ConfigError, match=r"older has no bfloat16: take float32, or .*--device cpu"
    ):
        resolve_dtype("bf16", device)


def test_each_of_several_cards_is_asked_for_itself(machine):
    cards = machine("cuda", 2, is_bf16_supported=lambda *, including_emulation: cards.current == 1)
    assert not computes_bf16(torch.device("cuda", 0))
    assert computes_bf16(torch.device("cuda", 1))


def test_free_memory_is_what_torch_keeps_too(machine):
    device = torch.device("cuda", 0)
    machine("cuda", 1, free=1000)
    assert free_memory(device) == 1400
    machine("xpu", 1)
    assert free_memory(device) is None


def test_what_apple_s_gpu_does_not_say_is_left_open(machine):
    machine("mps", 1)
    device = torch.device("mps", 0)
    assert not computes_bf16(device)
    assert peak_memory(device) is None
    assert device_name(device) == "mps:0"
    assert peak_memory(CPU) is None


def test_a_base_that_cannot_be_on_its_device_is_not_looked_for():
    with pytest.raises(ConfigError, match="device is 'xpu:99', but"):
        veneer.load_base("no-such-base", device="xpu:99")


@pytest.mark.parametrize("device", [CPU, torch.device("meta")])
def test_random_numbers_go_on_from_their_state(monkeypatch, device):
    module = SimpleNamespace(
        get_rng_state=lambda device: torch.get_rng_state(),
        set_rng_state=lambda state, device: torch.set_rng_state(state),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    state = devices.random_state(device)
    first = torch.rand(3)
    devices.set_random_state(device, state)
    assert torch.equal(torch.rand(3), first)


# The files that may name CUDA: what belongs to NVIDIA's and AMD's cards alone.
OWN_CUDA = {
    "cli/__init__.py": "the setting of its allocator",
    "doctor/advice.py": "what torch lacks where a driver of NVIDIA's is",
    "doctor/facts.py": "the variable by which cards are hidden",
    "doctor/measure.py": "for which cards torch is built",
    "kernels/choice.py": "which kernels a card has",
    "kernels/graphs.py": "its graphs",
    "kernels/transfer.py": "which devices read pinned memory by themselves",
    "models/device_names.py": "the names of devices",
    "quant/nf4.py": "bitsandbytes' functions for it",
    "training/adamw8bit.py": "for which devices bitsandbytes has optimizers",
}


def names_of_cuda(file: Path) -> list[str]:
    """Return where a file's code names CUDA: attributes, names, texts that document nothing."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    named = []
    for node in ast.walk(tree):
        text = {
            ast.Attribute: lambda n: n.attr,
            ast.Name: lambda n: n.id,
            ast.Constant: lambda n: n.value if id(n) not in texts else None,
            ast.alias: lambda n: n.name,
            ast.keyword: lambda n: n.arg,
        }.get(type(node), lambda n: None)(node)
        if isinstance(text, str) and "cuda" in text.lower():
            named.append(f"{file.name}:{getattr(node, 'lineno', 0)} {text}")
    return named


def test_no_call_names_cuda_but_in_files_that_are_of_cards_alone():
    root = Path(veneer.__file__).parent
    named = {str(file.relative_to(root)): names_of_cuda(file) for file in root.rglob("*.py")}
    wrong = {file: places for file, places in named.items() if places and file not in OWN_CUDA}
    assert wrong == {}
    assert [file for file in OWN_CUDA if not named[file]] == []


def test_the_law_sees_every_way_to_name_it(tmp_path):
    file = tmp_path / "code.py"
    file.write_text(
        '"""cuda"""\nimport torch.cuda\ntorch.cuda.is_available()\nx.is_cuda\nx.to("cuda:0")\n'
        'def f():\n    """Of CUDA."""\n    return g(cuda=1)\n',
        encoding="utf-8",
    )
    lines = [place.split(":")[1].split()[0] for place in names_of_cuda(file)]
    assert sorted(lines) == ["2", "3", "4", "5", "8"]


def test_runs_draw_what_they_draw_alone_on_either_device(machine):
    own = torch.Generator().manual_seed(5)  # what another device would draw from
    card = torch.device("xpu", 0)
    machine(
        *("xpu", 1),
        get_rng_state=lambda device: own.get_state(),
        set_rng_state=lambda state, device: own.set_state(state),
    )

    def draws(numbers: RandomNumbers) -> list[float]:
        with numbers.drawn():
            return [float(torch.rand(())), float(torch.rand((), generator=own))]

    def begun(seed: int) -> RandomNumbers:
        numbers = RandomNumbers(card)
        with numbers.drawn():
            torch.manual_seed(seed)
            own.manual_seed(seed)
        return numbers

    before = torch.get_rng_state(), own.get_state()
    alone = [[draws(numbers) for _ in range(3)] for numbers in map(begun, range(2))]
    one, other = begun(0), begun(1)
    turns = [(draws(one), draws(other)) for _ in range(3)]
    assert [*map(list, zip(*turns, strict=True))] == alone
    assert alone[0] != alone[1]
    assert all(map(torch.equal, before, (torch.get_rng_state(), own.get_state())))
