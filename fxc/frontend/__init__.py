"""From an nn.Module to a Program: what to call, torch.export, a flat graph of pure operators."""
