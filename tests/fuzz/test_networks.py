"""Random networks through a pass or two, by a seed: the gates hold, what is lowered computes what the program says, and what is
saved comes back."""

import pytest
import torch

from benchmarks.fuzz import networks

EACH = 4


@pytest.mark.fault(2, 3, 6, 12, 14, 15, 17)
@pytest.mark.parametrize("shard", range(len(networks.PASSES) // EACH + 1))
def test_a_random_network_goes_through_its_passes(shard, tmp_path):
    numbers = range(shard * EACH, min((shard + 1) * EACH, len(networks.PASSES)))
    outcomes = [networks.check(0, number, tmp_path) for number in numbers]
    assert len(outcomes) == len(numbers)


def test_every_pass_is_tried_and_networks_are_those_of_their_seed():
    from fxc.passes.base import Pass

    tried = {each.partition(":")[0] for each in networks.PASSES}
    assert set(Pass.registry) - tried <= {"recover"} | {name for name in Pass.registry if not _is_ours(name)}
    import random

    a, b = (networks.network(random.Random("one"))[0].state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def _is_ours(name: str) -> bool:
    from fxc.passes.base import Pass

    return Pass.registry[name].__module__.startswith("fxc.")
