"""Settings of adapters of PEFT: adapter_config.json beside weights that are as they should be."""

from functools import partial

from fuzz.adapters import KINDS, load, settings
from support import mutated_files

MODULES = (
    "veneer.formats.peft.reading",
    "veneer.formats.peft.rules",
    "veneer.formats.peft.directory",
)
FILE = ("peft", "adapter_config.json", tuple(KINDS))
seeds = partial(settings, *FILE)
read = partial(load, *FILE)
mutate = mutated_files.json_text
