"""Whether the base is unchanged, as a job of a comparison measures it."""

import veneer
from veneer.compare.measure import base_digests
from veneer.quant.weight import quantized_layers


def test_the_hash_of_the_base_sees_one_changed_number_and_no_adapter(minigpt_home):
    base = veneer.load_base(minigpt_home)
    before = base_digests(base.model)
    veneer.attach(base.model, veneer.LoRA(targets="all"))
    assert base_digests(base.model) == before
    name, weight = next(iter(base.model.named_parameters()))
    weight.data.view(-1)[-1] += 1e-3
    changed = {n for n, digest in base_digests(base.model).items() if digest != before[n]}
    assert changed == {name}


def test_the_hash_of_a_quantized_base_sees_one_changed_number(minigpt_home):
    model = veneer.load_base(minigpt_home, bits=4).model
    before = base_digests(model)
    assert len(before) > len(list(model.parameters()))
    layer = next(iter(quantized_layers(model).values()))
    next(iter(layer.quantized_weight.tensors().values())).view(-1)[0] += 1
    assert base_digests(model) != before
