"""Settings of our own adapters: lora_config.json beside weights that are as they should be."""

from functools import partial

from fuzz.adapters import KINDS, load, settings
from support import mutated_files

MODULES = (
    "veneer.formats.native",
    "veneer.formats.validate",
    "veneer.adapter.config",
)
FILE = ("native", "lora_config.json", tuple(KINDS)[1:])
seeds = partial(settings, *FILE)
read = partial(load, *FILE)
mutate = mutated_files.json_text
