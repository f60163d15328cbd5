"""Read directories that try to run code of their own or to keep us busy, in their own process.

It prints one line of JSON: how each ended and in how many seconds of the processor, which modules
were imported, and whether any of their code ran.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import veneer
from support.random_adapters import logits, shake, tokenizer
from support.tiny_models import tiny
from veneer.cli.console import quieten_libraries

CODE = "from pathlib import Path\nPath({mark!r}).touch()\nclass Sprung: pass\nevaluate = Sprung\n"
MAPS = {
    "AutoConfig": "evil_module.Sprung",
    "AutoModel": "evil_module.Sprung",
    "AutoModelForCausalLM": "evil_module.Sprung",
    "AutoTokenizer": ["evil_module.Sprung", "evil_module.Sprung"],
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "adapter with auto_map": {"auto_map": MAPS},
    "adapter with a parent module": {
        "auto_mapping": {"base_model_class": "Sprung", "parent_library": "evil_module"}
    },
    "adapter with tokenizer arguments": {
        "tokenizer_name_or_path": ".",
        "tokenizer_kwargs": {"trust_remote_code": True},
    },
    "adapter with a base that is a path": {"base_model_name_or_path": "./evil_module.py"},
    "catastrophic targets": {"target_modules": "(((.|.)+)+)+[A-Z]"},
    "catastrophic ranks": {"rank_pattern": {"(((.|.)+)+)+[A-Z]": 2, "((.)|(.)|(..))*[A-Z]": 3}},
    "catastrophic alphas": {"alpha_pattern": {r"(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)\8\7[A-Z]": 2}},
    "many catastrophic ranks": {
        "rank_pattern": {f"(((.|.){{1,{n}}})+)+[A-Z]": 2 for n in range(2, 500)}
    },
    "many unknown targets": {"target_modules": [f"x_proj_{n}" for n in range(20_000)]},
    "long unknown targets": {"target_modules": ["q_proj" * 20_000, "proj_" * 100_000]},
}
BASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base with auto_map": ({"auto_map": MAPS}, {}),
    "base of an unknown kind with auto_map": ({"auto_map": MAPS, "model_type": "evil_module"}, {}),
    "tokenizer with auto_map": ({}, {"auto_map": MAPS, "tokenizer_class": "Sprung"}),
    "tokenizer with arguments": ({}, {"tokenizer_class": "evil_module.Sprung", "auto_map": MAPS}),
    "base with generation of its own": ({"custom_generate": "evil_module"}, {}),
}


def plant(place: Path, mark: Path) -> None:
    """Put code into a directory, in every place where a library might look for it."""
    code = CODE.format(mark=str(mark))
    for name in ("evil_module.py", "custom_generate/generate.py", "modeling_evil.py"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(code)


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def tried(read: Any) -> tuple[str, float]:
    start = time.process_time()
    try:
        read()
    except veneer.VeneerError as error:
        return type(error).__name__, time.process_time() - start
    except Exception as error:
        return repr(error), time.process_time() - start
    return "loaded", time.process_time() - start


def main(home: Path) -> None:
    quieten_libraries()
    mark = home / "sprung"
    plant(home, mark)
    sys.path.insert(0, str(home))  # where an import of theirs would find it
    model = shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=2, targets="all"), seed=0))
    veneer.save(model, home / "adapter", format="peft")
    veneer.write_model(tiny("llama"), tokenizer(), home / "base")
    for place in (home / "adapter", home / "base"):
        plant(place, mark)

    model = tiny("llama")
    veneer.load(model, home / "adapter")
    veneer.load_base(home / "base", dtype="float32")
    logits(model)
    tried(lambda: veneer.load_base(home / "none"))
    veneer.detach(model)
    before = set(sys.modules)

    report: dict[str, Any] = {}
    for name, settings in ADAPTERS.items():
        place = home / name.replace(" ", "-")
        shutil.copytree(home / "adapter", place)
        change(place / "adapter_config.json", **settings)
        os.chdir(place)
        report[name] = tried(lambda place=place: veneer.load(model, place))
        veneer.detach(model)
    for name, (config, tokenizer_settings) in BASES.items():
        place = home / name.replace(" ", "-")
        shutil.copytree(home / "base", place)
        change(place / "config.json", **config)
        change(place / "tokenizer_config.json", **tokenizer_settings)
        os.chdir(place)
        report[name] = tried(lambda place=place: veneer.load_base(place, dtype="float32"))
    # transformers' own modules for other classes are not theirs.
    theirs = ("transformers.", "torch.", "veneer.")
    new = [name for name in sys.modules if name not in before and not name.startswith(theirs)]
    print(json.dumps({**report, "imported": sorted(new), "sprung": mark.exists()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
