"""What every training method shares: a `torch.optim.Optimizer` around a base optimizer."""
