"""Settings of adapters of mlx-lm: adapter_config.json beside weights that are right."""

from functools import partial

from fuzz.adapters import KINDS, load, settings
from support import mutated_files

MODULES = (
    "veneer.formats.mlx",
    "veneer.formats.mlx_experts",
)
FILE = ("mlx", "adapter_config.json", tuple(KINDS)[1:])
seeds = partial(settings, *FILE)
read = partial(load, *FILE)
mutate = mutated_files.json_text
