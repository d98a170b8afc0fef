import torch

import fxc
from fxc.calibrate.gradients import scores


def test_scores_are_the_squared_products_of_number_and_gradient():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    samples = [[torch.randn(4, 6, dtype=torch.float64)] for _ in range(3)]
    program = fxc.capture(net, tuple(samples[0]), check=False)
    found = scores(program, ["0.weight"], samples)
    expected = torch.zeros(5, 6, dtype=torch.float64)
    first, second = net[0].weight.detach(), net[2].weight.detach()
    for [x] in samples:
        hidden = net[:2](x).detach()
        direction = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double() / 12**0.5
        gradient = (direction @ second * (1 - hidden**2)).t() @ x
        expected += (gradient * first) ** 2 / 3
    torch.testing.assert_close(found["0.weight"].double(), expected, rtol=1e-5, atol=1e-12)
    assert not program.constants["0.weight"].requires_grad


def test_a_weight_that_the_loss_does_not_depend_on_scores_nothing():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.one(x), self.other(x) > 0

    samples = [[torch.randn(2, 4)]]
    found = scores(fxc.capture(Net(), tuple(samples[0]), check=False), ["one.weight", "other.weight"], samples)
    assert found["one.weight"].any() and not found["other.weight"].any()
